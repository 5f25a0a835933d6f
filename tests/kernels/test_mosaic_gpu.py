"""The kernels for Hopper GPUs without one: what they compute, in JAX's interpreter, and that they can be lowered.

The interpreter runs all that the kernels do (copies by TMA into the ring, barriers between warpgroups, wgmma, splits)
but one thing: wgmma with weights in registers, which go through shared memory there. It raises where two warpgroups
race for memory. Lowering checks layouts of registers and shared memory, as far as PTX instructions; ptxas does not run.
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

from jmemserve.kernels import Ragged, mosaic_gpu
from jmemserve.kernels.choice import Need, choose
from jmemserve.kernels.mosaic_gpu.work import splits_of
from jmemserve.kernels.rule import Rule

TOLERANCE = {"bfloat16": 1.5e-2, "float16": 2e-3}
NEED = Need("gpu", "NVIDIA H200", "bfloat16", 8, 4, 128, 16, 32)


def run(rows: Rows, sizes: Sizes, padding: tuple[int, int] = (0, 0), aggregated: bool = True, sinks=None, **rule):
    used = sum(new for _, new in rows)
    case = make_case(5, rows, sizes, used + padding[0], len(rows) + padding[1])
    close = TOLERANCE[sizes.dtype]
    attend = partial(mosaic_gpu.attend, interpret=plgpu.InterpretGPUParams(detect_races=True))
    check(attend, case, sizes, sizes.rule(**rule), sinks, aggregated, rtol=close, atol=close)


@pytest.mark.parametrize(
    "sizes, rule",
    [
        (Sizes(2, 1, 128, 2, 16, "bfloat16"), {}),
        (Sizes(1, 4, 64, 2, 64, "float16"), {"window": 50}),
        (Sizes(1, 16, 64, 2, 256, "bfloat16"), {"soft_cap": 2.0}),
        (Sizes(1, 2, 256, 2, 16, "bfloat16"), {"window": 40, "soft_cap": 2.0}),
        (Sizes(2, 1, 80, 2, 16, "float16"), {}),
    ],
    ids=["heads", "window", "large blocks", "gemma", "swizzle of 32"],
)
def test_one_token_per_row(sizes: Sizes, rule: dict) -> None:
    run([(130, 1), (64, 1), (3, 1)], sizes, (1, 1), **rule)


@pytest.mark.parametrize("window", [None, 300])
def test_a_long_row_is_split(window: int | None) -> None:
    assert splits_of(rows=1, kv_heads=1, spans=10, blocks=mosaic_gpu.Tiles().decode_blocks) == 2
    run([(600, 1)], Sizes(1, 2, 64, 2, 64, "bfloat16"), window=window)


@pytest.mark.parametrize(
    "rows, sizes, aggregated, rule",
    [
        ([(70, 1), (140, 40), (9, 2), (3, 3)], Sizes(1, 3, 64, 2, 16, "bfloat16"), True, {"window": 60}),
        ([(200, 150), (1, 1)], Sizes(2, 1, 128, 2, 32, "float16"), False, {}),
        ([(90, 70), (1, 1)], Sizes(1, 2, 256, 2, 16, "bfloat16"), True, {"window": 50}),
        ([(70, 9), (130, 1)], Sizes(1, 1, 96, 2, 32, "float16"), True, {"soft_cap": 2.0}),
        ([(400, 150), (5, 1)], Sizes(1, 1, 64, 2, 16, "bfloat16"), True, {}),
        ([(300, 140)], Sizes(1, 1, 64, 2, 64, "float16"), True, {"soft_cap": 3.0}),
    ],
    ids=["parts of rows in a tile", "a row in two tiles", "gemma", "swizzle of 64", "seen by all", "capped, by all"],
)
def test_mixed_batch(rows: Rows, sizes: Sizes, aggregated: bool, rule: dict) -> None:
    run(rows, sizes, (3, 1), aggregated, **rule)


def test_a_row_of_32k() -> None:
    run([(32768, 1)], Sizes(1, 2, 64, 2, 256, "bfloat16"))


def test_sinks() -> None:
    sinks = np.random.default_rng(7).normal(size=2).astype(np.float32) * 3
    run([(70, 1), (30, 20)], Sizes(1, 2, 64, 2, 64, "float16"), sinks=sinks, soft_cap=3.0)


# -- lowering ----------------------------------------------------------------------------------------------------------


def lowered(
    tokens: int, rows: int, heads: tuple[int, int, int], size: int, dtype: str, width: int, layers: int = 1, **rule
) -> str:
    """The text of some layers' attention for an H100; heads: K, G, H."""
    kv_heads, group, head_dim = heads
    made = jax.ShapeDtypeStruct

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return made(shape, jnp.int32)

    ragged = Ragged(ints(tokens), ints(tokens), ints(rows, width), ints(rows), ints(rows + 1))
    q, kv = made((tokens, kv_heads * group, head_dim), dtype), made((tokens, kv_heads, head_dim), dtype)
    pages = made((1000, layers + 1, 2, kv_heads, size, head_dim), dtype)

    def layer(q, k, v, pages, ragged):
        for number in range(1, layers + 1):
            q, pages = mosaic_gpu.attend(q, k, v, pages, number, ragged, Rule(head_dim**-0.5, **rule))
        return q, pages

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(layer, donate_argnums=3).trace(q, kv, kv, pages, ragged)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


LLAMA_3_8B, LLAMA_2_13B, QWEN_3_8B, SMALL_HEADS = (8, 4, 128), (40, 1, 128), (8, 4, 128), (2, 7, 64)
GEMMA_2_9B, PHI_3, PHI_2, WIDE_HEADS = (8, 2, 256), (32, 1, 96), (32, 1, 80), (4, 2, 192)


@pytest.mark.parametrize("rows", [1, 64, 256])
@pytest.mark.parametrize("heads", [LLAMA_3_8B, LLAMA_2_13B, SMALL_HEADS], ids=["llama 3", "llama 2", "small heads"])
def test_decode_lowers(heads: tuple[int, int, int], rows: int) -> None:
    text = lowered(rows, rows, heads, 16, "bfloat16", 512)
    assert text.count("custom_call @mosaic_gpu") == 1 and text.count("wgmma.mma_async") == 2


def test_layers_share_their_kernels() -> None:
    """Each costs half a second of tracing, and the first step as long again; two kinds of rows are two kernels."""
    assert lowered(64, 64, LLAMA_3_8B, 16, "bfloat16", 512, layers=6).count("custom_call @mosaic_gpu") <= 2
    assert lowered(512, 64, LLAMA_3_8B, 16, "bfloat16", 512, layers=6).count("custom_call @mosaic_gpu") <= 4


@pytest.mark.parametrize("heads", [GEMMA_2_9B, PHI_3, PHI_2, WIDE_HEADS], ids=["gemma 2", "phi 3", "phi 2", "192"])
def test_other_head_dims_lower(heads: tuple[int, int, int]) -> None:
    for rows in (1, 64):
        assert lowered(rows, rows, heads, 16, "bfloat16", 512).count("custom_call @mosaic_gpu") == 1
    text = lowered(2048, 64, heads, 16, "bfloat16", 512, window=4096, soft_cap=50.0)
    assert text.count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize(
    "heads, size, dtype, rule",
    [
        (LLAMA_3_8B, 16, "bfloat16", {}),
        (LLAMA_2_13B, 64, "float16", {}),
        (QWEN_3_8B, 256, "bfloat16", {"window": 4096}),
        (SMALL_HEADS, 32, "bfloat16", {"soft_cap": 30.0}),
    ],
    ids=["llama 3", "llama 2", "window", "small heads"],
)
def test_mixed_step_lowers(heads: tuple[int, int, int], size: int, dtype: str, rule: dict) -> None:
    text = lowered(2048, 64, heads, size, dtype, 8192 // size, **rule)
    assert text.count("custom_call @mosaic_gpu") == 2
    assert "tf.aliasing_output" in text, "the pages are written in place"


def test_each_device_of_a_mesh_lowers_its_own_heads() -> None:
    made, P = jax.ShapeDtypeStruct, jax.sharding.PartitionSpec
    ragged = Ragged(*(made(shape, jnp.int32) for shape in ((256,), (256,), (16, 64), (16,), (17,))))
    kv, pages = made((256, 8, 128), "bfloat16"), made((100, 2, 2, 8, 16, 128), "bfloat16")
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
    heads, page = P(None, "model"), P(None, None, None, "model")

    def layer(q, k, v, pages, ragged):
        return mosaic_gpu.attend(q, k, v, pages, 1, ragged, Rule(0.1))

    with jax.sharding.use_abstract_mesh(mesh):
        specs = (heads, heads, heads, page, P())
        sharded = jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=(heads, page), check_vma=False)
        traced = jax.jit(sharded).trace(made((256, 32, 128), "bfloat16"), kv, kv, pages, ragged)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2


# -- choice ------------------------------------------------------------------------------------------------------------


def test_hopper_gets_it_and_others_do_not() -> None:
    assert choose("auto", NEED).name == "mosaic_gpu"
    others = [
        {"device_kind": "NVIDIA A100-SXM4-80GB"},
        {"device_kind": "NVIDIA B200"},
        {"platform": "cpu"},
        {"dtype": "float32"},
        {"head_dim": 512},
        {"block_size": 8},
        {"block_size": 48},
        {"group": 128},
    ]
    for other in others:
        assert mosaic_gpu.why_not(dataclasses.replace(NEED, **other)), other
    assert choose("auto", dataclasses.replace(NEED, head_dim=512)).name == "xla"
