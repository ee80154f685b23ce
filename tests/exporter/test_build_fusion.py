"""What an engine runs, told by the list of its kernels: with plugins and without, chunks and single tokens.

L layers. Names of kernels are the library's: `__myl_MulSinCos_…` is one that it made of a multiplication, sines and
cosines.
"""

from __future__ import annotations

import pytest

from exporter.build.kernels import ATTENTION, COPY, OTHER, PLUGIN, PRODUCT, KernelCall
from runtime.engine_info import DECODE, PREFILL
from tests.support.engines import MODELS, Engine, engine, names, plugins, products

DENSE = [name for name in MODELS if name != "mixtral"]


def layers(model: str) -> int:
    number = MODELS[model].get("num_layers", 2)
    assert isinstance(number, int)
    return number


def every_profile(built: Engine) -> list[tuple[str, int]]:
    found = list(built.profiles())
    assert found == [(PREFILL, 0), (DECODE, 0), (DECODE, 1)]
    return found


@pytest.mark.parametrize("plugged", ["all", "none"])
@pytest.mark.parametrize("model", MODELS)
def test_queries_keys_and_values_are_one_product_and_so_are_gate_and_up(model: str, plugged: str) -> None:
    built = engine(model, plugins=plugged)
    for plan, profile in every_profile(built):
        multiplied = products(built.of(plan, profile))
        for layer in range(layers(model)):
            merged = [kernel for kernel in multiplied if _merges(kernel, layer, 3)]
            assert len(merged) == 1, (plan, profile, layer)
            assert len([kernel for kernel in multiplied if _merges(kernel, layer, 2)]) == (model in DENSE)
            if model != "int4":  # there the weights are constants, which are in no list
                weight = f"layers.{layer}.self_attn.q_proj+k_proj+v_proj.weight"
                assert [kernel for kernel in built.of(plan, profile) if weight in names(kernel.inputs)] == merged
        if model in DENSE:
            assert len(multiplied) == 4 * layers(model) + 1
        elif plugged == "all":
            assert len(multiplied) == 3 * layers(model) + 1  # the router's; experts are the plugin's


def _merges(kernel: KernelCall, layer: int, count: int) -> bool:
    """Whether a kernel computes what were `count` products of this layer, joined by a + in the node's name."""
    nodes = [node for node in kernel.nodes if node.startswith(f"layers.{layer}.node_linear")]
    return any(len(node.split("+")) == count for node in nodes)


@pytest.mark.parametrize("model", MODELS)
def test_only_the_plugin_touches_the_rings_and_nothing_repeats_them(model: str) -> None:
    built = engine(model, plugins="all")
    for plan, profile in every_profile(built):
        kernels = built.of(plan, profile)
        attending = plugins(kernels, "RollingAttention")
        assert len(attending) == layers(model)
        touching = [
            kernel
            for kernel in kernels
            if any(name.startswith(("past.", "present.")) for name in names([*kernel.inputs, *kernel.outputs]))
        ]
        assert touching == attending
        for layer, kernel in enumerate(attending):
            rings = [name for name in names(kernel.inputs) if name.startswith("past.")]
            assert rings == [f"past.{layer}.key", f"past.{layer}.value"]
            assert names(kernel.outputs)[1:] == [f"present.{layer}.key", f"present.{layer}.value"]
        assert not [kernel for kernel in kernels if kernel.kind == ATTENTION or "Scat" in kernel.name]


@pytest.mark.parametrize("model", ["window", "full", "layers", "mixtral"])
def test_the_plugin_reads_what_the_product_wrote_and_the_next_product_what_it_wrote(model: str) -> None:
    built = engine(model, plugins="all")
    for plan, profile in ((PREFILL, 0), (DECODE, 1)):
        multiplied = products(built.of(plan, profile))
        for kernel in plugins(built.of(plan, profile), "RollingAttention"):
            made, read = names(kernel.inputs)[0], names(kernel.outputs)[0]
            assert [k for k in multiplied if made in names(k.outputs)]
            assert [k for k in multiplied if read in names(k.inputs)]


@pytest.mark.parametrize("model", DENSE)
def test_rotation_norms_and_activations_are_no_chains(model: str) -> None:
    """Per layer: the norm before the second half, the activation, the norm before the next layer; once: the embedding
    with its norm, and the tables of sines and cosines. What rotates is inside the plugin."""
    built = engine(model, plugins="all")
    for plan, profile in ((PREFILL, 0), (DECODE, 1)):
        kernels = built.of(plan, profile)
        assert sum(kernel.kind == OTHER for kernel in kernels) == 2 + 3 * layers(model)
        assert [kernel.name for kernel in kernels if "Sin" in kernel.name or "Cos" in kernel.name] == [
            next(kernel.name for kernel in kernels if kernel.name.startswith("__myl_") and "SinCos" in kernel.name)
        ]
        moved = [kernel for kernel in kernels if kernel.kind == COPY]
        assert len([k for k in moved if not _is_logits(k.outputs)]) == (layers(model) if model == "int4" else 0)


def _is_logits(outputs: tuple[str, ...]) -> bool:
    return names(outputs) == ["logits"]


@pytest.mark.parametrize("model", MODELS)
def test_without_plugins_attention_is_one_kernel_of_a_layer(model: str) -> None:
    built = engine(model, plugins="none")
    for plan, profile in every_profile(built):
        kernels = built.of(plan, profile)
        assert not [kernel for kernel in kernels if kernel.kind == PLUGIN]
        assert sum(kernel.kind == ATTENTION for kernel in kernels) == layers(model)


def test_a_mixture_is_two_plugins_that_read_the_experts_where_they_lie() -> None:
    built = engine("mixtral", plugins="all")
    for plan, profile in every_profile(built):
        kernels = built.of(plan, profile)
        assert len(plugins(kernels, "MoEGate")) == 2
        mixing = plugins(kernels, "MixtureOfExperts")
        assert len(mixing) == 2
        for layer, kernel in enumerate(mixing):
            experts = {f"layers.{layer}.moe.{part}_proj" for part in ("gate", "up", "down")}
            assert experts <= set(names(kernel.inputs))
            assert [k for k in kernels if experts & set(names(k.inputs))] == [kernel]


def test_int4_weights_are_taken_apart_within_their_products() -> None:
    built = engine("int4", plugins="all")
    for plan, profile in every_profile(built):
        kernels = built.of(plan, profile)
        assert {kernel.kind for kernel in kernels} == {PRODUCT, PLUGIN, OTHER, COPY}
        assert not [kernel for kernel in kernels if "Int4" in " ".join(kernel.inputs) and kernel.kind != PRODUCT]


@pytest.mark.parametrize(("model", "plugged"), [("window", "none"), ("mixtral", "all")])
def test_the_newest_gpus_run_the_same_kernels(model: str, plugged: str) -> None:
    newest, other = (engine(model, plugins=plugged, compute_capability=capability) for capability in ("12.0", "8.9"))
    assert newest.info.compute_capability == "12.0"
    assert newest.built.kernels == other.built.kernels
    assert {kernel.name for kernel in newest.compiled} == {kernel.name for kernel in other.compiled}
