"""From logits to tokens, on the device. Traced code: arrays in, arrays out; logits are [V, B], one column per row.

A draw depends on (seed, position) and on the distribution, never on batch mates, instance or time, so that a
sequence can be replayed or moved in the middle of its stream. No sorting: top-k and top-p find their threshold by
bisection over the ordered bit patterns of float32, 32 passes that are exact.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jmemserve.types import MAX_LOGPROBS


def greedy(logits: jax.Array) -> jax.Array:
    """The likeliest token of each row, the first of equals: [V, B] -> i32[B].

    As argmax, by two plain reductions, of which a CPU makes vectors: a tenth of the time. Always a token, also of NaN.
    """
    size = logits.shape[0]
    place = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    return jnp.where(logits == logits.max(0, keepdims=True), place, size - 1).min(0)


def draw(logits: jax.Array, floats: jax.Array, ints: jax.Array) -> jax.Array:
    """One token per row: [V, B] -> i32[B].

    floats: f32[3, B] temperature (0: greedy), top_p, min_p. ints: i32[4, B] top_k (0: off), the two halves of the
    seed, position of the token to draw.
    """
    temperature, top_p, min_p = floats
    top_k, seed_high, seed_low, position = ints
    warm = temperature > 0
    scaled = logits / jnp.where(warm, temperature, 1)[None]
    cut = jnp.any(warm & ((top_k > 0) | (top_p < 1) | (min_p > 0)))
    scaled = lax.cond(cut, lambda x: _truncate(x, top_k, top_p, min_p), lambda x: x, scaled)

    def noise(high: jax.Array, low: jax.Array, place: jax.Array) -> jax.Array:
        seed = lax.bitcast_convert_type(jnp.stack([high, low]), jnp.uint32)
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), place)
        return jax.random.gumbel(key, (logits.shape[0],))

    gumbel = jax.vmap(noise, out_axes=1)(seed_high, seed_low, position)  # V B
    return greedy(jnp.where(warm[None], scaled + gumbel, logits))


def penalize(
    logits: jax.Array,
    history: jax.Array,
    counts: jax.Array,
    banned: jax.Array,
    floats: jax.Array,
    last: jax.Array,
    from_last: jax.Array,
) -> jax.Array:
    """Repetition, presence and frequency penalties, and the tokens that may not come yet: [V, B] -> [V, B].

    history: i32[B, M] the row's tokens as far as the host knows them; counts: i32[2, B] prompt tokens, all tokens in
    history; banned: i32[B, S] ids with logit -inf, -1 for none; floats: f32[3, B] repetition, presence, frequency;
    last: i32[R] the previous step's output and from_last: i32[B] the row in it with one more token, or -1.
    """
    vocabulary, rows = logits.shape
    repetition, presence, frequency = floats
    prompt, total = counts
    place = jnp.arange(history.shape[1])[None]
    row = jnp.broadcast_to(jnp.arange(rows)[:, None], history.shape)
    generated = (place >= prompt[:, None]) & (place < total[:, None])
    token = jnp.where(place < total[:, None], history, vocabulary)  # out of range: dropped
    seen = jnp.zeros((vocabulary, rows), bool).at[token, row].set(True, mode="drop")
    token = jnp.where(generated, history, vocabulary)
    count = jnp.zeros((vocabulary, rows), jnp.int32).at[token, row].add(1, mode="drop")
    newest = jnp.where(from_last >= 0, last[jnp.maximum(from_last, 0)], vocabulary)
    seen = seen.at[newest, jnp.arange(rows)].set(True, mode="drop")
    count = count.at[newest, jnp.arange(rows)].add(1, mode="drop")
    scaled = jnp.where(logits > 0, logits / repetition[None], logits * repetition[None])
    logits = jnp.where(seen, scaled, logits)
    logits = logits - count * frequency[None] - (count > 0) * presence[None]
    row = jnp.broadcast_to(jnp.arange(rows)[:, None], banned.shape)
    return logits.at[jnp.where(banned >= 0, banned, vocabulary), row].set(-jnp.inf, mode="drop")


def describe(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Log probabilities of the drawn tokens (i32[B]) and of the likeliest ones.

    Returns (logprob f32[B], rank i32[B] from 1, ids i32[B, MAX_LOGPROBS], their logprobs f32[B, MAX_LOGPROBS]).
    """
    logprobs = jax.nn.log_softmax(logits, axis=0)
    chosen = jnp.take_along_axis(logprobs, tokens[None], axis=0)  # 1 B
    rank = jnp.sum(logprobs > chosen, axis=0) + 1
    top, ids = lax.top_k(logprobs.T, min(MAX_LOGPROBS, logits.shape[0]))
    return chosen[0], rank.astype(jnp.int32), ids.astype(jnp.int32), top


def _truncate(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """-inf for all but the top_k likeliest, then all but the smallest set with mass top_p, then those below min_p.

    Equal logits stand or fall together.
    """
    order = _ordered(logits)
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[0]), logits.shape[0])
    floor = _highest(lambda at: jnp.sum(order >= at[None], axis=0) >= wanted, logits.shape[1])
    logits = jnp.where(order >= floor[None], logits, -jnp.inf)
    probability = jax.nn.softmax(logits, axis=0)
    order = _ordered(logits)

    def enough(at: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(order >= at[None], probability, 0), axis=0) >= top_p

    floor = jnp.where(top_p < 1, _highest(enough, logits.shape[1]), jnp.iinfo(jnp.int32).min)
    likely = probability >= min_p[None] * probability.max(0, keepdims=True)
    return jnp.where((order >= floor[None]) & likely, logits, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> int32 with the same order."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _highest(holds, rows: int) -> jax.Array:
    """The highest int32 per row at which ``holds`` (true below some point, false above it); the lowest if nowhere."""

    def body(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        middle = jnp.where(middle == low, high, middle)
        good = holds(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, jnp.maximum(middle - 1, low))

    info = jnp.iinfo(jnp.int32)
    start = (jnp.full(rows, info.min, jnp.int32), jnp.full(rows, info.max, jnp.int32))
    low, _ = lax.fori_loop(0, 34, body, start)
    return low
