"""The kernels for Ampere, Ada and Blackwell GPUs without one: what they compute, and that they are lowered.

JAX's interpreter knows neither mma nor cp.async, so what stands for them (``mosaic_ampere/machine.py``) is ``jnp.dot``
and Hopper's copies; all else is the kernels': the ring, waits, splits, softmax, work lists. It raises where memory is
read before it is there. Lowering has mma and cp.async, for either compute capability, and checks layouts of registers
and shared memory, as far as PTX instructions; ptxas does not run.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Rows, Sizes, check, make_case
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractMesh

from jmemserve.kernels import Ragged, attention_backend, mosaic_ampere, mosaic_gpu, mosaic_mma
from jmemserve.kernels.choice import Need, choose
from jmemserve.kernels.mosaic_ampere.decode import BLOCKS
from jmemserve.kernels.mosaic_gpu.work import splits_of
from jmemserve.kernels.rule import Rule

TOLERANCE = {"bfloat16": 1.5e-2, "float16": 2e-3}
NEED = Need("gpu", "NVIDIA A100-SXM4-80GB", "bfloat16", 8, 4, 128, 16, 32)


def run(rows: Rows, sizes: Sizes, padding: tuple[int, int] = (0, 0), aggregated: bool = True, sinks=None, **rule):
    used = sum(new for _, new in rows)
    case = make_case(5, rows, sizes, used + padding[0], len(rows) + padding[1])
    close = TOLERANCE[sizes.dtype]
    attend = partial(mosaic_ampere.attend, interpret=plgpu.InterpretGPUParams(detect_races=True))
    check(attend, case, sizes, sizes.rule(**rule), sinks, aggregated, rtol=close, atol=close)


@pytest.mark.parametrize(
    "sizes, rule",
    [
        (Sizes(2, 1, 128, 2, 16, "bfloat16"), {}),
        (Sizes(1, 4, 64, 2, 64, "float16"), {"window": 50}),
        (Sizes(1, 16, 64, 2, 256, "bfloat16"), {"soft_cap": 2.0}),
        (Sizes(1, 1, 96, 2, 16, "bfloat16"), {}),
        (Sizes(1, 2, 256, 2, 64, "bfloat16"), {"window": 50, "soft_cap": 50.0}),
    ],
    ids=["heads", "window", "large blocks", "head of 96", "wide head"],
)
def test_one_token_per_row(sizes: Sizes, rule: dict) -> None:
    run([(130, 1), (64, 1), (3, 1)], sizes, (1, 1), **rule)


@pytest.mark.parametrize("window", [None, 300])
def test_a_long_row_is_split(window: int | None) -> None:
    assert splits_of(rows=1, kv_heads=1, spans=10, blocks=BLOCKS) == 2
    run([(600, 1)], Sizes(1, 2, 64, 2, 64, "bfloat16"), window=window)


@pytest.mark.parametrize(
    "rows, sizes, aggregated, rule",
    [
        ([(70, 1), (140, 40), (9, 2), (3, 3)], Sizes(1, 3, 64, 2, 16, "bfloat16"), True, {"window": 60}),
        ([(120, 70), (1, 1)], Sizes(2, 1, 128, 2, 32, "float16"), False, {}),
        ([(70, 70), (5, 1)], Sizes(1, 1, 96, 2, 32, "bfloat16"), True, {}),
        ([(90, 40), (33, 1)], Sizes(1, 2, 256, 2, 16, "float16"), True, {"window": 30}),
        ([(200, 80), (5, 1)], Sizes(1, 1, 64, 2, 16, "bfloat16"), True, {"soft_cap": 3.0}),
    ],
    ids=["parts of rows in a tile", "a row in two tiles", "head of 96", "wide head", "seen by all"],
)
def test_mixed_batch(rows: Rows, sizes: Sizes, aggregated: bool, rule: dict) -> None:
    run(rows, sizes, (3, 1), aggregated, **rule)


def test_a_row_of_32k() -> None:
    run([(32768, 1)], Sizes(1, 2, 64, 2, 256, "bfloat16"))


def test_sinks() -> None:
    sinks = np.random.default_rng(7).normal(size=2).astype(np.float32) * 3
    run([(70, 1), (30, 20)], Sizes(1, 2, 64, 2, 64, "float16"), sinks=sinks, soft_cap=3.0)


# -- lowering ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device(jax.sharding.AbstractDevice):
    """One that is not here; Pallas takes those that do not say their compute capability for Hoppers."""

    compute_capability: str = "8.0"


A100 = Device(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
L4 = Device(device_kind="NVIDIA L4", num_cores=58, platform="gpu", compute_capability="8.9")
H200 = Device(device_kind="NVIDIA H200", num_cores=132, platform="gpu", compute_capability="9.0")
B200 = Device(device_kind="NVIDIA B200", num_cores=148, platform="gpu", compute_capability="10.0")
RTX_5090 = Device(device_kind="NVIDIA GeForce RTX 5090", num_cores=170, platform="gpu", compute_capability="12.0")


def lowered(
    device: Device, tokens: int, rows: int, heads: tuple[int, int, int], size: int, dtype: str, width: int, **rule
) -> str:
    """The text of one layer's attention for a device; heads: K, G, H."""
    kv_heads, group, head_dim = heads
    made = jax.ShapeDtypeStruct

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return made(shape, jnp.int32)

    ragged = Ragged(ints(tokens), ints(tokens), ints(rows, width), ints(rows), ints(rows + 1))
    q, kv = made((tokens, kv_heads * group, head_dim), dtype), made((tokens, kv_heads, head_dim), dtype)
    attend = attention_backend("mosaic_ampere" if device in (A100, L4) else "mosaic_mma")
    pages = made((1000, 2, 2, kv_heads, size, head_dim), dtype)

    def layer(q, k, v, pages, ragged):
        return attend(q, k, v, pages, 1, ragged, Rule(head_dim**-0.5, **rule))

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(layer, donate_argnums=3).trace(q, kv, kv, pages, ragged)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


LLAMA_3_8B, LLAMA_2_13B, SMALL_HEADS, WIDE_GROUP = (8, 4, 128), (40, 1, 128), (2, 7, 64), (1, 16, 128)


@pytest.mark.parametrize("device", [A100, L4], ids=["A100", "L4"])
@pytest.mark.parametrize("rows", [1, 256])
@pytest.mark.parametrize("heads", [LLAMA_3_8B, SMALL_HEADS, WIDE_GROUP], ids=["llama 3", "small heads", "wide group"])
def test_decode_lowers(heads: tuple[int, int, int], rows: int, device: Device) -> None:
    text = lowered(device, rows, rows, heads, 16, "bfloat16", 512)
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "mma.sync.aligned.m16n8k16" in text and "wgmma" not in text
    assert "fence.proxy" not in text and "nvvm.fence" not in text, "these GPUs have no such instruction"


@pytest.mark.parametrize("device", [H200, B200, RTX_5090], ids=["H200", "B200", "RTX 5090"])
@pytest.mark.parametrize("tokens, rows", [(1, 1), (256, 256), (2048, 64)])
@pytest.mark.parametrize("heads", [LLAMA_3_8B, SMALL_HEADS], ids=["llama 3", "small heads"])
def test_it_lowers_for_later_gpus(heads: tuple[int, int, int], tokens: int, rows: int, device: Device) -> None:
    text = lowered(device, tokens, rows, heads, 16, "bfloat16", 512)
    assert text.count("custom_call @mosaic_gpu") == (1 if tokens == rows else 2)
    assert "mma.sync.aligned.m16n8k16" in text and "wgmma" not in text
    assert "cp.async.bulk" in text, "pages come by the tensor memory accelerator"


@pytest.mark.parametrize("device", [A100, B200], ids=["A100", "B200"])
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_every_block_size_lowers(size: int, device: Device) -> None:
    lowered(device, 64, 8, SMALL_HEADS, size, "float16", 4096 // size)


@pytest.mark.parametrize("device", [A100, L4, RTX_5090], ids=["A100", "L4", "RTX 5090"])
@pytest.mark.parametrize("head_dim", mosaic_ampere.HEADS)
def test_every_head_dim_lowers(head_dim: int, device: Device) -> None:
    text = lowered(device, 64, 8, (1, 2, head_dim), 16, "bfloat16", 64)
    assert text.count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize(
    "heads, size, dtype, rule",
    [
        (LLAMA_3_8B, 16, "bfloat16", {}),
        (LLAMA_2_13B, 64, "float16", {}),
        (LLAMA_3_8B, 256, "bfloat16", {"window": 4096}),
        (SMALL_HEADS, 32, "bfloat16", {"soft_cap": 30.0}),
    ],
    ids=["llama 3", "llama 2", "window", "small heads"],
)
def test_mixed_step_lowers(heads: tuple[int, int, int], size: int, dtype: str, rule: dict) -> None:
    text = lowered(A100, 2048, 64, heads, size, dtype, 8192 // size, **rule)
    assert text.count("custom_call @mosaic_gpu") == 2
    assert "tf.aliasing_output" in text, "the pages are written in place"


# -- choice ------------------------------------------------------------------------------------------------------------

SERVED = [
    "NVIDIA A100-SXM4-80GB",
    "NVIDIA A100 80GB PCIe",
    "NVIDIA A10G",
    "NVIDIA A10",
    "NVIDIA A40",
    "NVIDIA L4",
    "NVIDIA L40S",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 4090",
    "NVIDIA RTX A6000",
    "NVIDIA RTX 6000 Ada Generation",
    "NVIDIA A10M",
    "GRID A100D-80C",
]
BLACKWELL = [
    "NVIDIA B200",
    "NVIDIA GB300",
    "NVIDIA GeForce RTX 5090",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
]
NOT_SERVED = [
    "Tesla T4",
    "Tesla V100-SXM2-16GB",
    "Quadro RTX 4000",
    "NVIDIA GeForce RTX 2080 Ti",
]


@pytest.mark.parametrize("kind", SERVED)
def test_it_is_chosen_on_ampere_and_ada(kind: str) -> None:
    assert choose("auto", dataclasses.replace(NEED, device_kind=kind)).name == "mosaic_ampere"


@pytest.mark.parametrize("kind", BLACKWELL)
def test_its_sister_is_chosen_on_blackwell(kind: str) -> None:
    assert choose("auto", dataclasses.replace(NEED, device_kind=kind)).name == "mosaic_mma"


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA H20-3e", "NVIDIA H100-80C"])
def test_hoppers_have_their_own(kind: str) -> None:
    assert choose("auto", dataclasses.replace(NEED, device_kind=kind)).name == "mosaic_gpu"


def test_its_sister_stands_in_on_hopper() -> None:
    need = dataclasses.replace(NEED, device_kind="NVIDIA H200")
    assert choose("auto", need).name == "mosaic_gpu"
    assert choose("auto", need, lambda name: "wrong" if name == "mosaic_gpu" else None).name == "mosaic_mma"


@pytest.mark.parametrize("kind", NOT_SERVED)
def test_other_gpus_are_refused(kind: str) -> None:
    need = dataclasses.replace(NEED, device_kind=kind)
    assert "compute capability 8" in str(mosaic_ampere.why_not(need))
    assert "from Hopper on" in str(mosaic_mma.why_not(need))


def test_what_it_cannot_serve_is_refused() -> None:
    others = [
        {"platform": "cpu"},
        {"dtype": "float32"},
        {"head_dim": 288},
        {"block_size": 8},
        {"block_size": 48},
        {"group": 17},
    ]
    for other in others:
        assert mosaic_ampere.why_not(dataclasses.replace(NEED, **other)), other
        assert mosaic_mma.why_not(dataclasses.replace(NEED, **{"device_kind": "NVIDIA B200", **other})), other
    assert mosaic_gpu.why_not(NEED)
