"""What a session will take in memory, from the manifest alone, before anything is loaded.

    weights    stored weights that the engine reads where they lie: pages of files, shared by all sessions of a machine
    folded     weights that are made when the engine loads, because no kernel reads them as they are stored
    kv         the rings of keys and values
    buffers    what a step of a whole chunk holds at once between its nodes, and its logits
    overhead   Python, numpy, ONNX Runtime, the graph, and the slack of the allocators: measured, and the same for all

Letters: B rows, C chunk, H heads, S slots, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.manifest import Manifest, WeightsInfo
from runtime.rolling_kv import kv_bytes

OVERHEAD_BYTES = 84 << 20
"""Measured with ONNX Runtime 1.31 and Python 3.11: 62 MiB after loading, and up to 22 of slack in the allocators."""

_LOADING_FACTOR = 1.2
"""Peak of loading over what all steps of making weights give out; see `runtime.backends.onnxruntime.folds_weights`."""

_STORED_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of a session; see above. total: their sum. loading: the most that is taken for a moment while it loads.

    Of a mixture of experts the buffers are an upper bound, since a manifest does not say how many experts there are.
    """

    weights: int
    folded: int
    kv: int
    buffers: int
    overhead: int
    loading: int
    total: int = field(init=False)

    def __post_init__(self) -> None:
        total = self.weights + self.folded + self.kv + self.buffers + self.overhead
        object.__setattr__(self, "total", total)


def estimate(
    manifest: Manifest, *, batch: int = 1, kernels_active: bool, folds: bool = True, all_logits: bool = False
) -> MemoryEstimate:
    """What a session with `batch` rows takes.

    kernels_active: whether native kernels run, which read weights as they are stored; else function bodies do.
    folds: whether weights that must be made are made once and kept; else every step makes each anew and drops it.
    all_logits: whether the logits of all tokens are asked for (`Session.forward`), and not those of last ones only, as
    in generation.
    """
    model, kv, weights = manifest.model, manifest.kv, manifest.weights
    stored = _stored_bytes(weights, model.parameters)
    made, making = (
        (weights.made_bytes, weights.making_bytes) if kernels_active else (weights.folded_bytes, weights.folding_bytes)
    )
    folded = made if folds else 0
    # What was made is read from then on, and what it was made of is not: those pages are given back.
    mapped = stored - _replaced(weights, stored, model.parameters, kernels_active=kernels_active) if folds else stored
    # Each token of a chunk holds about as many numbers at once as the matrices of one layer have rows.
    rows = model.parameters // (model.num_layers * model.hidden_size)
    numbers = batch * kv.chunk * rows
    if not kernels_active:  # scores, and their weights behind the softmax
        numbers += 2 * batch * model.num_heads * kv.chunk * max(layer.capacity for layer in kv.layers)
    numbers += batch * model.vocab_size * (kv.chunk if all_logits else 1)
    return MemoryEstimate(
        weights=mapped,
        folded=folded,
        kv=kv_bytes(
            [layer.capacity for layer in kv.layers],
            batch=batch, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, dtype=kv.dtype,
        ),
        buffers=_FLOAT32 * numbers,
        overhead=OVERHEAD_BYTES,
        loading=OVERHEAD_BYTES + (int(making * _LOADING_FACTOR) if folds else 0),
    )  # fmt: skip


def shortage(needed: MemoryEstimate, available: int | None) -> str | None:
    """A sentence for a person when `needed` is more than the bytes that are free (None: nobody knows), else None."""
    if available is None or needed.total <= available:
        return None
    return (
        f"This session takes about {needed.total / 1e9:.1f} GB of memory, {needed.weights / 1e9:.1f} of them for "
        f"weights that stay in their files, and {available / 1e9:.1f} GB are free: what does not fit is read from disk "
        "again in every step, which is many times slower. Free memory, or export with fewer bits a weight."
    )


def _stored_bytes(weights: WeightsInfo, parameters: int) -> int:
    """Bytes of the stored weights: of their files, of which a checkpoint's may hold more than the graph reads."""
    widest = max((_STORED_BYTES.get(name, _FLOAT32) for name in weights.types), default=_FLOAT32)
    files = sum(info.bytes for info in weights.files.values())
    # Quantised weights have scales beside them, and are always in a file of their own.
    return files if weights.quantization is not None else min(files, parameters * widest)


def _replaced(weights: WeightsInfo, stored: int, parameters: int, *, kernels_active: bool) -> int:
    """Bytes of stored weights that nobody reads any more once others have been made of them."""
    if kernels_active:  # stacked and put in order, in the same type
        return min(stored, weights.made_bytes)
    if weights.quantization is not None:  # packed anew, in as many bytes; what is kept in 16 bits, in twice as many
        return min(stored, weights.folded_bytes)
    return stored - max(0, _FLOAT32 * parameters - weights.folded_bytes)  # what is left is float32 already
