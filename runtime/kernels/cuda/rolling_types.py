"""What rolling attention's launchers share: the names and sizes of element types on the device, and one check."""

from __future__ import annotations

from runtime.errors import BackendError
from runtime.kernels.cuda.rolling_problem import RollingProblem, RollingTensors

DEVICE_TYPES = {"bfloat16": "BFloat16", "float16": "Float16", "float8": "Float8"}
"""What `device.cuh` calls an element type."""
TYPE_BYTES = {"bfloat16": 2, "float16": 2, "float8": 1}
VECTOR_BYTES = 16
"""What the kernels load and store at once."""
MOST_SLOTS = 2**31 - 1
MOST_STRIDE = 2**31 - 1
MOST_BLOCKS = 65535
"""Along the second and third axis of a grid."""


def token_strides(problem: RollingProblem) -> tuple[int, int, int]:
    """Elements from one token's query, key and value to the next one's."""
    query, key = problem.heads * problem.head_dim, problem.kv_heads * problem.head_dim
    return problem.query_stride or query, problem.key_stride or key, problem.value_stride or key


def check_launch(problem: RollingProblem, tensors: RollingTensors) -> None:
    """Raises BackendError for addresses and strides that vectors cannot be loaded from, and for sizes of no grid."""
    for name in ("query", "key", "value", "cos", "sin", "key_ring", "value_ring", "attended", "workspace"):
        if getattr(tensors, name) % VECTOR_BYTES:
            raise BackendError(
                f"The CUDA kernels of RollingAttention need {name} at a multiple of {VECTOR_BYTES} bytes, and it lies "
                f"at {getattr(tensors, name):#x}. Give it memory of its own."
            )
    vector = VECTOR_BYTES // TYPE_BYTES[problem.activations]
    heads = (problem.heads, problem.kv_heads, problem.kv_heads)
    for name, stride, least in zip(("query", "key", "value"), token_strides(problem), heads, strict=True):
        if stride % vector or not least * problem.head_dim <= stride <= MOST_STRIDE:
            raise BackendError(
                f"The CUDA kernels of RollingAttention need a {name} every {least * problem.head_dim} to {MOST_STRIDE} "
                f"elements, a multiple of {vector}, and get one every {stride}. Copy them apart first."
            )
    if problem.slots > MOST_SLOTS or problem.batch > MOST_BLOCKS or problem.heads > MOST_BLOCKS:
        raise BackendError(
            f"The CUDA kernels of RollingAttention take at most {MOST_SLOTS} slots and {MOST_BLOCKS} rows and heads, "
            f"not {problem.slots}, {problem.batch} and {problem.heads}."
        )
