"""Every backend of paged attention against float64 numpy, on ragged batches with poisoned pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmemserve.kernels import Ragged, attention_backend
from jmemserve.kernels.pages import gather_blocks, scatter_blocks, write_kv

KV_HEADS, GROUP, HEAD, LAYERS = 2, 3, 8, 2


def make_case(seed: int, rows: list[tuple[int, int]], size: int, num_tokens: int, num_rows: int):
    """rows: (context, new tokens) of each. Unused memory is NaN: touching it shows."""
    rng = np.random.default_rng(seed)
    width = max(1, max(-(-context // size) for context, _ in rows))
    num_pages = 1 + width * num_rows
    pages = np.full((num_pages, LAYERS, 2, KV_HEADS, size, HEAD), np.nan, np.float32)
    free = list(rng.permutation(np.arange(1, num_pages)))
    tables = np.zeros((num_rows, width), np.int32)
    context, starts = np.zeros(num_rows, np.int32), np.zeros(num_rows + 1, np.int32)
    q = rng.normal(size=(num_tokens, KV_HEADS * GROUP, HEAD)).astype(np.float32)
    slots, positions = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int32)
    keys, token = [], 0
    new_kv = rng.normal(size=(2, num_tokens, KV_HEADS, HEAD)).astype(np.float32)
    for b, (total, new) in enumerate(rows):
        table = [free.pop() for _ in range(-(-total // size))]
        tables[b, : len(table)] = table
        kv = rng.normal(size=(2, total, KV_HEADS, HEAD)).astype(np.float32)
        for place in range(total - new):
            pages[table[place // size], 1, :, :, place % size] = kv[:, place]
        for place in range(total - new, total):
            slots[token], positions[token] = table[place // size] * size + place % size, place
            kv[:, place] = new_kv[:, token]
            token += 1
        context[b], starts[b + 1] = total, token
        keys.append(kv)
    starts[len(rows) + 1 :] = token
    ragged = Ragged(*(jnp.asarray(x) for x in (positions, slots, tables, context, starts)))
    return q, jnp.asarray(pages), ragged, new_kv, keys


def expected(q: np.ndarray, rows: list[tuple[int, int]], keys: list[np.ndarray], window: int | None) -> np.ndarray:
    out, token = [], 0
    for (total, new), (k, v) in zip(rows, keys, strict=True):
        for place in range(total - new, total):
            low = 0 if window is None else max(0, place - window + 1)
            heads = q[token].reshape(KV_HEADS, GROUP, HEAD).astype(np.float64)
            scores = np.einsum("kgh,skh->kgs", heads, k[low : place + 1].astype(np.float64)) * HEAD**-0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out.append(np.einsum("kgs,skh->kgh", weights, v[low : place + 1].astype(np.float64)).reshape(-1, HEAD))
            token += 1
    return np.array(out)


def run(backend: str, seed: int, rows, size: int, window: int | None, num_tokens: int, num_rows: int) -> None:
    q, pages, ragged, new_kv, keys = make_case(seed, rows, size, num_tokens, num_rows)

    @jax.jit
    def call(q, pages, ragged, new_kv):
        pages = write_kv(pages, 1, ragged.slots, new_kv[0], new_kv[1])
        return attention_backend(backend)(q, pages, 1, ragged, window)

    used = sum(new for _, new in rows)
    discrete = tuple(pages[:, layer] for layer in range(LAYERS))
    for layout in (pages, discrete):
        out = np.asarray(call(q, layout, ragged, new_kv))
        np.testing.assert_allclose(out[:used], expected(q, rows, keys, window), rtol=2e-5, atol=2e-6)


BACKENDS = ["xla", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 5, 150])
@pytest.mark.parametrize("size", [1, 16, 256])
def test_mixed_batch(backend: str, window: int | None, size: int) -> None:
    rows = [(300, 1), (1, 1), (140, 140), (257, 30), (17, 2), (128, 1), (129, 129)]
    if size == 1:
        rows = [(40, 1), (140, 9), (6, 6)]
    run(backend, 0, rows, size, window, num_tokens=sum(n for _, n in rows) + 5, num_rows=len(rows) + 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 100])
def test_one_token_per_row(backend: str, window: int | None) -> None:
    run(backend, 1, [(500, 1), (3, 1), (128, 1), (129, 1)], 16, window, num_tokens=6, num_rows=6)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 99),
    rows=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 150)), min_size=1, max_size=6),
    window=st.sampled_from([None, 37]),
)
def test_random_batches(seed: int, rows: list[tuple[int, int]], window: int | None) -> None:
    run("xla", seed, [(old + new, new) for old, new in rows], 16, window, num_tokens=900, num_rows=6)


def test_padding_is_finite() -> None:
    q, pages, ragged, new_kv, _ = make_case(2, [(20, 4)], 16, num_tokens=16, num_rows=4)
    pages = write_kv(pages, 1, ragged.slots, new_kv[0], new_kv[1])
    assert np.isfinite(np.asarray(attention_backend("xla")(jnp.asarray(q), pages, 1, ragged, None))).all()


def test_blocks_come_back_as_they_left() -> None:
    pages = jax.random.normal(jax.random.key(0), (9, LAYERS, 2, KV_HEADS, 4, HEAD))
    moved = scatter_blocks(jnp.zeros_like(pages), jnp.array([5, 1]), gather_blocks(pages, jnp.array([3, 8])))
    np.testing.assert_array_equal(moved[5], pages[3])
    np.testing.assert_array_equal(moved[1], pages[8])
    assert float(jnp.abs(moved).sum()) == pytest.approx(float(jnp.abs(pages[jnp.array([3, 8])]).sum()), rel=1e-6)
