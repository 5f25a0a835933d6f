"""One layer's attention of a step, whichever kernels do it: writing keys and values, rows of both kinds, sinks."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels import Ragged
from jmemserve.kernels.mosaic_gpu.plan import Pool
from jmemserve.kernels.pages import Pages, page_sizes, write_kv
from jmemserve.kernels.rule import Rule

OneTokenRows = Callable[[Pool, jax.Array, "Keys", jax.Array], tuple[jax.Array, jax.Array]]
ManyTokenRows = Callable[[Pool, jax.Array, "Keys", Ragged], tuple[jax.Array, jax.Array]]


class Keys(NamedTuple):
    """Of one layer, and its values."""

    kv: jax.Array  # [pages and all in them, C, H]
    tables: jax.Array  # i32[B, W] in whole spans
    offset: jax.Array  # i32[1] where the layer begins in a page, in units of [C, H]: so that layers share a kernel


def attend_by(
    one_token_rows: OneTokenRows,
    many_token_rows: ManyTokenRows,
    longest: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: Pages,
    layer: int,
    ragged: Ragged,
    rule: Rule,
    sinks: jax.Array | None,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[jax.Array, Pages]:
    """See ``jmemserve.kernels.Attention``.

    one_token_rows: (pool, q [B, K, G, H], keys, context i32[B], 0 for rows to skip) -> ([B, K, G, H], log2 of the sum
    of exponentials f32[B, K, G]); many_token_rows: (pool, q [T, K, G, H], keys, ragged) -> the same with T, anything
    for tokens of rows with one. ``longest``: keys of their longest span.
    """
    pages = write_kv(pages, layer, ragged.slots, k, v)
    num_tokens, num_heads, head_dim = q.shape
    num_rows = ragged.context.shape[0]
    kv_heads, size = page_sizes(pages)
    own = pages[layer] if isinstance(pages, tuple) else pages
    pool = Pool(
        rule=rule,
        dtype=jnp.dtype(own.dtype),
        head=head_dim,
        size=size,
        page_stride=math.prod(own.shape[1:-2]),
        value_offset=kv_heads,
        interpret=interpret,
    )
    keys = Keys(
        own.reshape(-1, size, head_dim),  # no copy: all but the last two axes are one
        jnp.pad(ragged.tables, ((0, 0), (0, -ragged.tables.shape[1] % max(1, longest // size)))),
        jnp.full(1, 0 if isinstance(pages, tuple) else layer * 2 * kv_heads, jnp.int32),
    )
    grouped = q.astype(own.dtype).reshape(num_tokens, kv_heads, num_heads // kv_heads, head_dim)
    if num_tokens == num_rows:  # the shape of a step in which every row has one token
        out, lse = one_token_rows(pool, grouped, keys, ragged.context)
        return _finished(out, lse, sinks, q), pages
    lengths = ragged.starts[1:] - ragged.starts[:-1]
    single = lengths == 1
    first = jnp.minimum(ragged.starts[:-1], num_tokens - 1)
    one_out, one_lse = one_token_rows(pool, grouped[first], keys, jnp.where(single, ragged.context, 0))
    out, lse = many_token_rows(pool, grouped, keys, ragged)
    target = jnp.where(single, first, num_tokens)
    out = out.at[target].set(one_out.astype(out.dtype), mode="drop", unique_indices=True)
    lse = lse.at[target].set(one_lse, mode="drop", unique_indices=True)
    return _finished(out, lse, sinks, q), pages


def _finished(out: jax.Array, lse: jax.Array, sinks: jax.Array | None, q: jax.Array) -> jax.Array:
    """[T, K, G, H] and f32[T, K, G] -> like q; a sink is one more exponential in the sum, without a value."""
    if sinks is not None:
        share = jax.nn.sigmoid(lse * math.log(2) - sinks.reshape(1, *lse.shape[1:]))
        out = out.astype(jnp.float32) * share[..., None]
    return out.reshape(q.shape).astype(q.dtype)
