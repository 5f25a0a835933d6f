"""The portable backends of paged attention against float64 numpy, on ragged batches with poisoned pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Rows, Sizes, check, make_case
from hypothesis import given, settings
from hypothesis import strategies as st

from jmemserve.kernels import attention_backend
from jmemserve.kernels.pages import gather_blocks, scatter_blocks

BACKENDS = ["xla", "reference"]


def run(backend: str, seed: int, rows: Rows, sizes: Sizes, padding: int = 0, **more) -> None:
    used = sum(new for _, new in rows)
    case = make_case(seed, rows, sizes, used + padding, len(rows) + min(padding, 2))
    for aggregated in (True, False):
        sinks = more.get("sinks")
        rule = sizes.rule(more.get("window"), more.get("soft_cap"))
        check(attention_backend(backend), case, sizes, rule, sinks, aggregated)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 5, 150])
@pytest.mark.parametrize("size", [1, 16, 256])
def test_mixed_batch(backend: str, window: int | None, size: int) -> None:
    rows = [(300, 1), (1, 1), (140, 140), (257, 30), (17, 2), (128, 1), (129, 129)]
    if size == 1:
        rows = [(40, 1), (140, 9), (6, 6)]
    run(backend, 0, rows, Sizes(block=size), padding=5, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rows", [[(300, 1), (140, 140), (257, 30)], [(500, 1), (3, 1), (128, 1)]], ids=["mixed", "ones"]
)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_soft_cap_and_sinks(backend: str, rows: Rows, sinks: bool, soft_cap: float | None) -> None:
    sizes = Sizes()
    extra = np.random.default_rng(7).normal(size=sizes.kv_heads * sizes.group).astype(np.float32) * 3
    run(backend, 3, rows, sizes, padding=2, window=64, soft_cap=soft_cap, sinks=extra if sinks else None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 100])
def test_one_token_per_row(backend: str, window: int | None) -> None:
    run(backend, 1, [(500, 1), (3, 1), (128, 1), (129, 1)], Sizes(), padding=2, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_rows(backend: str) -> None:
    sizes, rows = Sizes(1, 2, 64, 2, 64), [(32768, 1), (20000, 40), (1, 1)]
    check(attention_backend(backend), make_case(9, rows, sizes, 45, 4), sizes, sizes.rule())


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 99),
    rows=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 150)), min_size=1, max_size=6),
    window=st.sampled_from([None, 37]),
)
def test_random_batches(seed: int, rows: Rows, window: int | None) -> None:
    rows = [(old + new, new) for old, new in rows]
    case = make_case(seed, rows, Sizes(), num_tokens=900, num_rows=6)
    check(attention_backend("xla"), case, Sizes(), Sizes().rule(window))


def test_blocks_come_back_as_they_left() -> None:
    pages = jax.random.normal(jax.random.key(0), (9, 2, 2, 2, 4, 8))
    moved = scatter_blocks(jnp.zeros_like(pages), jnp.array([5, 1]), gather_blocks(pages, jnp.array([3, 8])))
    np.testing.assert_array_equal(moved[5], pages[3])
    np.testing.assert_array_equal(moved[1], pages[8])
    assert float(jnp.abs(moved).sum()) == pytest.approx(float(jnp.abs(pages[jnp.array([3, 8])]).sum()), rel=1e-6)
