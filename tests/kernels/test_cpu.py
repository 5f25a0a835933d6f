"""The C++ library for CPUs: attention against float64 on ragged batches with poisoned pages, products against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Rows, Sizes, check, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from jmemserve.kernels import Ragged, block_moves, cpu, pages
from jmemserve.kernels.choice import Need, why_not
from jmemserve.kernels.cpu import library, moves
from jmemserve.kernels.rule import Rule

try:
    ISAS = [isa for isa in ("base", "avx2", "avx512", "avx512bf16", "neon") if library.instruction_set(isa)]
except library.Missing as error:
    pytest.skip(str(error), allow_module_level=True)

MIXED = [(300, 1), (1, 1), (140, 140), (257, 30), (17, 2), (600, 1), (129, 129)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [None, 5, 150])
@pytest.mark.parametrize("size", [1, 16, 256])
def test_mixed_batch(isa: str, window: int | None, size: int) -> None:
    sizes = Sizes(block=size)
    case = make_case(0, MIXED, sizes, sum(new for _, new in MIXED) + 5, len(MIXED) + 2)
    for aggregated in (True, False):
        check(functools.partial(cpu.attend, isa=isa), case, sizes, sizes.rule(window), aggregated=aggregated)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head", [4, 24, 64, 80, 128])
@pytest.mark.parametrize("dtype, kv_dtype", [("float32", None), ("bfloat16", None), ("float32", "bfloat16")])
def test_heads_and_types(isa: str, head: int, dtype: str, kv_dtype: str | None) -> None:
    sizes = Sizes(kv_heads=3, group=2, head=head, dtype=dtype, kv_dtype=kv_dtype)
    case = make_case(1, [(90, 1), (70, 40), (520, 1), (33, 2)], sizes, 50, 6)
    tolerance = 1e-2 if dtype == "bfloat16" else 2e-5
    check(functools.partial(cpu.attend, isa=isa), case, sizes, sizes.rule(), rtol=tolerance, atol=tolerance / 5)


@pytest.mark.parametrize("isa", ISAS)
def test_long_rows(isa: str) -> None:
    sizes, rows = Sizes(1, 2, 64, 2, 64), [(32768, 1), (20000, 40), (1, 1)]
    check(functools.partial(cpu.attend, isa=isa), make_case(9, rows, sizes, 45, 4), sizes, sizes.rule())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_soft_cap_and_sinks(isa: str, soft_cap: float | None, sinks: bool) -> None:
    sizes = Sizes(group=5, head=16)
    extra = np.random.default_rng(7).normal(size=10).astype(np.float32) * 3 if sinks else None
    case = make_case(3, MIXED, sizes)
    rule = sizes.rule(window=64, soft_cap=soft_cap)
    check(functools.partial(cpu.attend, isa=isa), case, sizes, rule, extra)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 99),
    rows=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 150)), min_size=1, max_size=6),
    window=st.sampled_from([None, 37]),
)
def test_random_batches(seed: int, rows: Rows, window: int | None) -> None:
    rows = [(old + new, new) for old, new in rows]
    check(cpu.attend, make_case(seed, rows, Sizes(), num_tokens=900, num_rows=6), Sizes(), Sizes().rule(window))


def test_a_row_does_not_depend_on_its_company() -> None:
    sizes = Sizes(head=32)
    alone = make_case(5, [(700, 1)], sizes)
    together = make_case(5, [(700, 1), (1300, 1), (90, 60)], sizes, 70, 5)
    layer, rule = alone.layer, sizes.rule()

    def first(case):
        q, k, v = (x[:1] for x in (alone.q, alone.k, alone.v))
        place = case.ragged.tables[0]
        own = alone.pages[alone.ragged.tables[0][: len(alone.ragged.tables[0])]]
        pages = jnp.asarray(case.pages).at[place[: own.shape[0]]].set(own)
        queries = (
            jnp.concatenate((mine, rest[1:])) for mine, rest in zip((q, k, v), (case.q, case.k, case.v), strict=True)
        )
        return np.asarray(cpu.attend(*queries, pages, layer, case.ragged, rule)[0])[0]

    np.testing.assert_array_equal(first(alone), first(together))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 70, 129])
@pytest.mark.parametrize("rows, depth", [(1, 5), (37, 64), (200, 600), (97, 1100)])
def test_products(isa: str, columns: int, rows: int, depth: int) -> None:
    rng = np.random.default_rng(columns)
    plain = rng.normal(size=(depth, columns)).astype(np.float32)
    for dtype, x_dtype in (
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("int8", "float32"),
        ("int8", "bfloat16"),
    ):
        x = plain.astype(jnp.dtype(x_dtype))
        weight = rng.normal(size=(rows, depth)) * (30 if dtype == "int8" else 1)
        weight = weight.astype(np.int8) if dtype == "int8" else weight.astype(jnp.dtype(dtype))
        wanted = weight.astype(np.float64) @ x.astype(np.float64)
        got = np.asarray(cpu.project(jnp.asarray(weight), jnp.asarray(x), isa=isa))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max() * depth**0.5)


@pytest.mark.parametrize("window, good", [(4, False), (None, False), (4, True)])
def test_a_table_that_names_no_page_is_an_error_wherever_a_token_looks(window: int | None, good: bool) -> None:
    """With a window the first of a row's new tokens sees further back than the last."""
    tables = np.array([[2, 1, 3, 1]] if good else [[10**7, 10**7, 10**7, 1]], np.int32)
    new, context = 60, 64
    at = np.arange(context - new, context, dtype=np.int32)
    slots = np.full(new, 16, np.int32)
    ragged = Ragged(*(jnp.asarray(x) for x in (at, slots, tables, np.int32([context]), np.int32([0, new]))))
    q, k, v = (jnp.ones((new, 1, 64), jnp.float32) for _ in range(3))
    pages = jnp.zeros((8, 1, 2, 1, 16, 64), jnp.float32)
    run = jax.jit(lambda q, k, v, pages: cpu.attend(q, k, v, pages, 0, ragged, Rule(1.0, window))[0])
    if good:
        assert np.isfinite(np.asarray(run(q, k, v, pages))).all()
        return
    with pytest.raises(Exception, match="a table names no page"):
        np.asarray(run(q, k, v, pages))


@pytest.mark.parametrize("columns, used", [(8, 3), (64, 0), (64, 1), (64, 9), (64, 40), (64, 64)])
def test_columns_of_padding_are_zero_whatever_they_hold(columns: int, used: int) -> None:
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(50, 96)), jnp.bfloat16)
    x = rng.normal(size=(96, columns)).astype(np.float32)
    x[:, used:] = np.nan
    got = np.asarray(jax.jit(cpu.project)(weight, jnp.asarray(x), jnp.int32(used)))
    wanted = np.asarray(weight).astype(np.float32) @ x[:, :used]
    np.testing.assert_allclose(got[:, :used], wanted, rtol=1e-4, atol=1e-4)
    assert not got[:, used:].any()


def test_what_it_cannot_serve_is_said() -> None:
    good = Need("cpu", "cpu", "float32", 2, 4, 64, 16, 2)
    assert why_not("cpu", good) is None
    assert "CPUs" in why_not("cpu", Need("gpu", "NVIDIA H200", "float32", 2, 4, 64, 16, 2))
    assert "float16" in why_not("cpu", Need("cpu", "cpu", "float16", 2, 4, 64, 16, 2))
    assert "1024" in why_not("cpu", Need("cpu", "cpu", "float32", 2, 4, 1024, 16, 2))


@pytest.mark.parametrize("slot, table, context", [(10**6, 1, 5), (16, 10**6, 5), (16, 1, 10**6), (-1, 1, 5)])
def test_numbers_that_lead_outside_of_the_pages_are_refused(slot: int, table: int, context: int) -> None:
    from jmemserve.kernels import Ragged

    one = [jnp.asarray([x], jnp.int32) for x in (context - 1, slot)]
    places = Ragged(*one, jnp.asarray([[table]]), jnp.asarray([context]), jnp.asarray([0, 1]))
    zeros = jnp.zeros((1, 2, 8))
    with pytest.raises(jax.errors.JaxRuntimeError, match="jmemserve: "):
        jax.block_until_ready(
            cpu.attend(zeros, zeros, zeros, jnp.zeros((3, 1, 2, 2, 16, 8)), 0, places, Sizes().rule())
        )


# -- moves of blocks ---------------------------------------------------------------------------------------------------


def blocks_like(shape: tuple[int, ...], dtype: str) -> jax.Array:
    raw = np.random.default_rng(3).integers(0, 256, (*shape[:-1], shape[-1] * jnp.dtype(dtype).itemsize), np.uint8)
    return jnp.asarray(raw.view(jnp.dtype(dtype)))


def same_bytes(one: pages.Pages, other: pages.Pages) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("sizes", [(3, 2, 4, 8), (2, 3, 7, 5), (4, 8, 64, 128)], ids=["small", "odd", "streamed"])
def test_blocks_are_moved_as_by_xla(sizes: tuple[int, ...], dtype: str) -> None:
    layers, *own = sizes
    whole = blocks_like((13, layers, 2, *own), dtype)
    discrete = tuple(whole[:, layer] for layer in range(layers))
    numbers, part = jnp.array([7, 1, 12, 3]), (jnp.int32(1), jnp.int32(0))
    blocks = blocks_like((4, layers, 2, *own), dtype)
    for held in (whole, discrete):
        same_bytes(jax.jit(moves.gather_blocks)(held, numbers), pages.gather_blocks(held, numbers))
        expected = pages.scatter_blocks(held, numbers, blocks)
        same_bytes(jax.jit(moves.scatter_blocks)(held, numbers, blocks), expected)
    for held, index in ((whole, part), (discrete[1], part[1:])):
        some = blocks[:, 0, 0]
        same_bytes(jax.jit(moves.gather_part)(held, numbers, *index), pages.gather_part(held, numbers, *index))
        expected = pages.scatter_part(held, numbers, some, *index)
        same_bytes(jax.jit(moves.scatter_part)(held, numbers, some, *index), expected)


def test_blocks_are_scattered_in_place() -> None:
    held = tuple(jnp.zeros((9, 2, 2, 4, 8)) for _ in range(3))
    where = [array.unsafe_buffer_pointer() for array in held]
    scatter = jax.jit(moves.scatter_blocks, donate_argnums=0)
    after = scatter(held, jnp.array([2, 5]), jnp.ones((2, 3, 2, 2, 4, 8)))
    assert [array.unsafe_buffer_pointer() for array in after] == where


def test_a_block_outside_of_the_pages_is_an_error() -> None:
    for number in (-1, 5):
        with pytest.raises(Exception, match="outside of the pages"):
            jax.block_until_ready(jax.jit(moves.gather_blocks)(jnp.zeros((5, 1, 2, 1, 4, 8)), jnp.array([1, number])))


def test_one_cpu_moves_blocks_by_the_library_and_several_do_not() -> None:
    one, two = (block_moves(Mesh(jax.devices()[:count], ("model",))) for count in (1, 2))
    assert one == {"cpu": moves, "xla": pages} and list(one) == ["cpu", "xla"] and two == {"xla": pages}
