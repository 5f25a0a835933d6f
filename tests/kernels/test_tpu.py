"""Paged attention for TPUs: simulated on a CPU, against float64, and lowered for a TPU at the sizes of real models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Rows, Sizes, check, make_case
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jmemserve.kernels import Ragged, tpu
from jmemserve.kernels.choice import Need, choose, why_not
from jmemserve.kernels.rule import Rule
from jmemserve.kernels.tpu import kernel

# The detector raises if two accesses of memory, one of them a write, are not ordered by semaphores.
SIMULATED = functools.partial(tpu.attend, interpret=pltpu.InterpretParams(detect_races=True))
SIZES = Sizes(kv_heads=2, group=2, head=128, block=16)
MIXED: Rows = [(40, 1), (1, 1), (21, 21), (290, 3)]


def run(rows: Rows, sizes: Sizes, padding: int = 0, aggregated: bool = True, sinks: bool = False, **more) -> None:
    used = sum(new for _, new in rows)
    case = make_case(5, rows, sizes, used + padding, len(rows) + min(padding, 2))
    rng = np.random.default_rng(7)
    extra = rng.normal(size=sizes.kv_heads * sizes.group).astype(np.float32) * 3 if sinks else None
    rule = sizes.rule(more.get("window"), more.get("soft_cap"))
    close = {"rtol": 3e-2, "atol": 3e-2} if sizes.dtype == "bfloat16" else {}
    check(SIMULATED, case, sizes, rule, extra, aggregated, fold=tpu.fold(sizes.head), **close)


def test_a_row_of_32k() -> None:
    run([(32768, 1)], Sizes(1, 2, 64, 2, 256, "bfloat16"))


@pytest.mark.parametrize("aggregated", [True, False], ids=["aggregated", "discrete"])
def test_mixed_batch(aggregated: bool) -> None:
    run(MIXED, SIZES, padding=5, aggregated=aggregated)


def test_one_token_per_row() -> None:
    run([(300, 1), (3, 1), (32, 1)], SIZES, padding=2)


def test_window_soft_cap_and_sinks() -> None:
    run(MIXED, SIZES, padding=3, window=20, soft_cap=2.0, sinks=True)


def test_a_tile_that_ends_within_a_row() -> None:
    run([(150, 140), (9, 9)], Sizes(1, 1, 128, block=64), window=30)


def test_bfloat16_with_more_heads_than_are_worked_on_together() -> None:
    run([(33, 1), (20, 18)], Sizes(4, 1, 128, block=32, dtype="bfloat16"), padding=1, sinks=True)


@pytest.mark.parametrize("aggregated", [True, False], ids=["aggregated", "discrete"])
def test_two_tokens_in_a_row(aggregated: bool) -> None:
    run([(40, 1), (21, 21), (61, 4)], Sizes(2, 2, 64, block=16), padding=3, aggregated=aggregated)


def test_two_tokens_in_a_row_with_window_soft_cap_and_sinks() -> None:
    run([(39, 1), (62, 33)], Sizes(1, 3, 64, block=16, dtype="bfloat16"), window=13, soft_cap=2.0, sinks=True)


def test_four_tokens_in_a_row_and_one_new_of_each_sequence() -> None:
    run([(70, 1), (33, 1), (1, 1)], Sizes(2, 1, 32, block=32), padding=1)


def test_no_token_at_all() -> None:
    case = make_case(0, [(0, 0)], SIZES, num_tokens=3, num_rows=2)
    pages = jnp.zeros_like(case.pages)
    out, same = SIMULATED(case.q, case.k, case.v, pages, 0, case.ragged, SIZES.rule())
    assert not out.any() and not same.any()


def test_every_chunk_of_a_long_prompt_is_written() -> None:
    run([(90, 85), (10, 10)], Sizes(1, 2, 128, layers=3, block=8), window=9)


@pytest.mark.parametrize(
    "rows", [[(40, 1), (1, 1), (33, 1)], [(40, 1), (21, 21), (5, 3), (9, 1)]], ids=["ones", "mixed"]
)
def test_tables_that_do_not_fit_at_once(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_SMEM", 2 * 3 * 4)  # two rows of three pages
    run(rows, SIZES, padding=2)


# -- lowering for a TPU ------------------------------------------------------------------------------------------------

TPU = AbstractMesh((), (), abstract_device=AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"))


def lowered(
    sizes: Sizes,
    num_rows: int,
    num_tokens: int,
    sinks: bool = False,
    aggregated: bool = True,
    max_len: int = 4096,
    layers: int = 2,
) -> str:
    """The text of some layers' attention, as it would be given to a TPU's compiler."""
    t, width, num_pages = num_tokens, max_len // sizes.block, 100
    of = jax.ShapeDtypeStruct
    ints = ((t,), (t,), (num_rows, width), (num_rows,), (num_rows + 1,))
    ragged = Ragged(*(of(shape, jnp.int32) for shape in ints))
    num_heads = sizes.kv_heads * sizes.group
    q, k = (of((t, heads, sizes.head), sizes.dtype) for heads in (num_heads, sizes.kv_heads))
    fold = tpu.fold(sizes.head)
    page = (2, sizes.kv_heads, sizes.block // fold, sizes.head * fold)
    pages = of((num_pages, sizes.layers, *page), sizes.dtype)
    laid = pages if aggregated else tuple(of((num_pages, *page), sizes.dtype) for _ in range(sizes.layers))

    def step(q, k, v, pages, ragged, sinks):
        for layer in range(layers):
            q, pages = tpu.attend(q, k, v, pages, layer, ragged, Rule(sizes.head**-0.5), sinks)
        return q, pages

    with jax.sharding.use_abstract_mesh(TPU):
        traced = jax.jit(step, donate_argnums=3).trace(
            q, k, k, laid, ragged, of((num_heads,), jnp.float32) if sinks else None
        )
        return traced.lower(lowering_platforms=("tpu",)).as_text()


LLAMA_8B = {block: Sizes(8, 4, 128, 32, block, "bfloat16") for block in (16, 64, 128)}
LLAMA_13B = Sizes(40, 1, 128, 40, 16, "bfloat16")


@pytest.mark.parametrize("tokens", [64, 2048], ids=["decode", "packed"])
@pytest.mark.parametrize("sizes", [*LLAMA_8B.values(), LLAMA_13B], ids=["8B-16", "8B-64", "8B-128", "13B"])
def test_lowers_at_the_sizes_of_real_models(sizes: Sizes, tokens: int) -> None:
    assert lowered(sizes, 64, tokens).count("tpu_custom_call") == 4, "two kernels in each of two layers"


def test_layers_share_their_kernels() -> None:
    """Each kernel costs a second of tracing; the first layer may have one of its own, as its arrays are arguments."""
    assert lowered(LLAMA_8B[16], 64, 64, layers=8).count("tpu_custom_call") <= 4


@pytest.mark.parametrize("aggregated", [True, False], ids=["aggregated", "discrete"])
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(2, 7, 128, 2, 8),
        Sizes(4, 2, 256, 2, 256, "bfloat16"),
        Sizes(8, 8, 64, 2, 16, "bfloat16"),
        Sizes(8, 1, 32, 2, 32),
    ],
    ids=["f32", "h256", "h64", "h32"],
)
def test_lowers_other_sizes(sizes: Sizes, aggregated: bool) -> None:
    assert "tpu_custom_call" in lowered(sizes, 8, 200, sinks=True, aggregated=aggregated)


@pytest.mark.parametrize("tokens", [64, 2048], ids=["decode", "packed"])
def test_lowers_with_many_rows_of_a_long_context(tokens: int) -> None:
    text = lowered(Sizes(8, 4, 128, 2, 16, "bfloat16"), 64, tokens, max_len=131_072)
    assert text.count("tpu_custom_call") == 2 * (1 + 4), "one writes, four attend, each for 16 rows"


def test_a_table_beyond_scalar_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="larger blocks"):
        lowered(Sizes(1, 1, 128, 2, 8), 1, 8, max_len=2 << 20)


@pytest.mark.parametrize("tokens", [16, 256], ids=["decode", "packed"])
def test_each_device_of_a_mesh_lowers_its_own_heads(tokens: int) -> None:
    of = jax.ShapeDtypeStruct
    ragged = Ragged(*(of(shape, jnp.int32) for shape in ((tokens,), (tokens,), (16, 64), (16,), (17,))))
    q, kv = of((tokens, 32, 128), "bfloat16"), of((tokens, 8, 128), "bfloat16")
    pages = of((100, 2, 2, 8, 16, 128), "bfloat16")
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((2,), ("model",), axis_types=(AxisType.Auto,), abstract_device=device)
    heads, page = P(None, "model"), P(None, None, None, "model")

    def layer(q, k, v, pages, ragged):
        return tpu.attend(q, k, v, pages, 1, ragged, Rule(0.1))

    with jax.sharding.use_abstract_mesh(mesh):
        specs = (heads, heads, heads, page, P())
        sharded = jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=(heads, page), check_vma=False)
        text = jax.jit(sharded).trace(q, kv, kv, pages, ragged).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2


# -- the choice --------------------------------------------------------------------------------------------------------

NEED = Need("tpu", "TPU v5 lite", "bfloat16", 8, 4, 128, 16, 32)


def test_it_is_the_first_choice_on_a_tpu() -> None:
    assert choose("auto", NEED).name == "tpu"


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_other_head_dims_are_served(head_dim: int, block: int) -> None:
    assert choose("auto", dataclasses.replace(NEED, head_dim=head_dim, block_size=block)).name == "tpu"


@pytest.mark.parametrize(
    "other",
    [
        {"platform": "gpu"},
        {"dtype": "float16"},
        {"block_size": 24},
        {"head_dim": 64, "block_size": 8},
    ],
    ids=str,
)
def test_what_it_cannot_serve_it_refuses(other: dict) -> None:
    need = dataclasses.replace(NEED, **other)
    assert why_not("tpu", need)
    with pytest.raises(ValueError, match="not possible here"):
        choose("tpu", need)
