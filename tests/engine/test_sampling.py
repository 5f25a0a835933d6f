"""Sampling against sorting in numpy, and its independence of batch mates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmemserve.engine import sampling

V = 101


def kept(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens of one row may be drawn, by sorting; equal logits stand or fall together."""
    alive = np.ones(V, bool)
    if top_k > 0:
        alive &= logits >= np.sort(logits)[::-1][min(top_k, V) - 1]
    probability = np.where(alive, np.exp(logits - logits.max()), 0).astype(np.float64)
    probability /= probability.sum()
    if top_p < 1:
        order = np.argsort(-probability, kind="stable")
        last = order[np.searchsorted(np.cumsum(probability[order]), top_p)]
        alive &= probability >= probability[last]
    return alive & (probability >= min_p * probability.max())


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    top_k=st.sampled_from([0, 1, 2, 7, 500]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_truncation_is_that_of_sorting(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=(V, 3)).astype(np.float32) * 3
    cut = sampling._truncate(jnp.asarray(logits), *(jnp.full(3, x) for x in (top_k, top_p, min_p)))
    for column in range(3):
        expected = kept(logits[:, column], top_k, top_p, min_p)
        np.testing.assert_array_equal(np.isfinite(np.asarray(cut)[:, column]), expected)


def rows(num: int, temperature=1.0, top_p=1.0, min_p=0.0, top_k=0, seed=0, position=0):
    floats = jnp.asarray(np.stack([np.full(num, x, np.float32) for x in (temperature, top_p, min_p)]))
    ints = [np.full(num, top_k), np.full(num, seed >> 32), np.full(num, seed & 0xFFFFFFFF), np.arange(num) + position]
    return floats, jnp.asarray(np.stack(ints).astype(np.uint32).view(np.int32))


def test_a_draw_does_not_depend_on_batch_mates() -> None:
    logits = jax.random.normal(jax.random.key(0), (V, 8))
    floats, ints = rows(8, seed=2**40 + 17)
    together = sampling.draw(logits, floats, ints)
    alone = [int(sampling.draw(logits[:, i : i + 1], floats[:, i : i + 1], ints[:, i : i + 1])[0]) for i in range(8)]
    assert together.tolist() == alone


def test_draws_follow_the_distribution() -> None:
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    num = 4000
    drawn = sampling.draw(jnp.repeat(logits[:, None], num, 1), *rows(num, seed=5))
    shares = np.bincount(np.asarray(drawn), minlength=3) / num
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.04)
    cold = sampling.draw(jnp.repeat(logits[:, None], num, 1), *rows(num, temperature=0.0))
    assert set(cold.tolist()) == {0}


@pytest.mark.parametrize("promised", [False, True])
def test_penalties(promised: bool) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(V, 1)).astype(np.float32)
    prompt, output = [3, 4, 4], [5, 5, 6]
    expected = logits[:, 0].copy()
    for token in set(prompt + output):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token in set(output):
        expected[token] -= 0.25 * output.count(token) + 0.5
    expected[[9, 10]] = -np.inf
    visible = output[:-1] if promised else output
    history = np.zeros((1, 12), np.int32)
    history[0, : len(prompt + visible)] = prompt + visible
    out = sampling.penalize(
        jnp.asarray(logits),
        jnp.asarray(history),
        jnp.array([[3], [3 + len(visible)]]),
        jnp.array([[9, 10, -1]]),
        jnp.array([[1.5], [0.5], [0.25]]),
        jnp.array([8, 6]),
        jnp.array([1 if promised else -1]),
    )
    np.testing.assert_allclose(np.asarray(out)[:, 0], expected, rtol=1e-6)


def test_log_probabilities() -> None:
    logits = jax.random.normal(jax.random.key(1), (V, 2))
    tokens = jnp.array([7, int(jnp.argmax(logits[:, 1]))])
    chosen, rank, ids, top = sampling.describe(logits, tokens)
    expected = np.asarray(jax.nn.log_softmax(logits, axis=0))
    np.testing.assert_allclose(chosen, [expected[7, 0], expected[:, 1].max()], rtol=1e-6)
    assert rank.tolist() == [int((expected[:, 0] > expected[7, 0]).sum()) + 1, 1]
    np.testing.assert_array_equal(ids[1], np.argsort(-expected[:, 1], kind="stable")[: ids.shape[1]])
    np.testing.assert_allclose(top[1], np.sort(expected[:, 1])[::-1][: top.shape[1]], rtol=1e-6)


def test_greedy_is_argmax() -> None:
    rng = np.random.default_rng(0)
    logits = rng.integers(-3, 4, (50, 40)).astype(np.float32)  # with many equals
    logits[:, 0] = -np.inf
    logits[7, 1] = np.inf
    np.testing.assert_array_equal(sampling.greedy(jnp.asarray(logits)), logits.argmax(0))
    logits[:, 2] = np.nan
    assert 0 <= int(sampling.greedy(jnp.asarray(logits))[2]) < 50
