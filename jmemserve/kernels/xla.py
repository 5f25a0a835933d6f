"""Paged attention in plain XLA operations: the portable backend, and the one for CPU.

The cost grows with the tokens in context, not with the width of the table: the work is cut into items, only items
that exist are visited (a loop with a trip count known at run time), and each visit combines a partial softmax.

    rows with one new token     item = (row, span of keys); a few items per visit; partial results meet in the row
    rows with several           item = (row, tile of queries), and inside it a loop over its spans of keys

    keys of one row:   |span 0|span 1|span 2|sp..      a window skips whole spans in front
                              ^ first        ^ context
"""

import jax
import jax.numpy as jnp
from jax import lax

from jmemserve.kernels import Ragged
from jmemserve.kernels.pages import Pages, page_sizes, read_rows, write_kv
from jmemserve.kernels.rule import Rule

SPAN = 64  # keys per item when rows have one new token: their bytes stay in cache between the two products
ITEMS = 16  # items per visit
TILE = 128  # queries per tile when a row has several new tokens
TILE_SPAN = 128  # keys that a tile looks at in one go
NEVER = -1e30  # a score that is never seen; finite, so that fully masked partial results stay finite


def why_not(need: object) -> None:
    """Nothing: it serves every model on every device."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: Pages,
    layer: int,
    ragged: Ragged,
    rule: Rule,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, Pages]:
    """See ``jmemserve.kernels.Attention``."""
    pages = write_kv(pages, layer, ragged.slots, k, v)
    num_tokens, num_rows = q.shape[0], ragged.context.shape[0]
    lengths = ragged.starts[1:] - ragged.starts[:-1]  # B: new tokens of each row
    tables = _whole_spans(ragged.tables, page_sizes(pages)[1], max(SPAN, TILE_SPAN))
    if num_tokens == num_rows:  # the shape of a step in which every row has one token
        return _one_token_rows(q, pages, layer, tables, ragged.context, rule, sinks), pages
    row_tokens = jnp.minimum(ragged.starts[:-1], num_tokens - 1)
    single = lengths == 1
    ones = _one_token_rows(q[row_tokens], pages, layer, tables, jnp.where(single, ragged.context, 0), rule, sinks)
    out = _many_token_rows(q, pages, layer, ragged, tables, jnp.where(single, 0, lengths), rule, sinks)
    return out.at[jnp.where(single, row_tokens, num_tokens)].set(ones, mode="drop"), pages


def _one_token_rows(
    q: jax.Array,
    pages: Pages,
    layer: int,
    tables: jax.Array,
    context: jax.Array,
    rule: Rule,
    sinks: jax.Array | None,
) -> jax.Array:
    """q: [B, N, H], row b's only new token being its last one. Rows with context 0 cost nothing."""
    num_rows, num_heads, head_dim = q.shape
    kv_heads, size = page_sizes(pages)
    span, per_span = _span_of(size, SPAN)
    visit = min(ITEMS, num_rows)
    grouped = q.reshape(num_rows, kv_heads, num_heads // kv_heads, head_dim).astype(jnp.float32) * rule.scale
    low = jnp.zeros_like(context) if rule.window is None else jnp.maximum(context - rule.window, 0)
    first = low // span  # B
    counts = jnp.where(context > 0, -(-context // span) - first, 0)
    ends = jnp.cumsum(counts)
    total = ends[-1]

    def body(step: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
        top, mass, mixed = carry
        item = step * visit + jnp.arange(visit)
        row = jnp.minimum(jnp.searchsorted(ends, item, side="right"), num_rows - 1)
        chunk = jnp.where(item < total, item - (ends - counts)[row] + first[row], 0)
        place = chunk[:, None] * span + jnp.arange(span)[None]  # visit, span
        seen = (place < context[row][:, None]) & (place >= low[row][:, None]) & (item < total)[:, None]
        index = tables[row[:, None], chunk[:, None] * per_span + jnp.arange(per_span)[None]]
        k, v = (_rows_of(read_rows(pages, index, layer, half)) for half in (0, 1))  # visit, K, span, H
        scores = _capped(jnp.einsum("bkgh,bksh->bkgs", grouped[row], k), rule)
        scores = jnp.where(seen[:, None, None], scores, NEVER)
        part_top = scores.max(-1)
        weights = jnp.where(seen[:, None, None], jnp.exp(scores - part_top[..., None]), 0)
        v = jnp.where(seen[:, None, :, None], v, 0)  # a page's unused end may hold anything, even NaN
        part_mixed = jnp.einsum("bkgs,bksh->bkgh", weights, v)
        new_top = top.at[row].max(part_top)
        keep, take = jnp.exp(top - new_top), jnp.exp(part_top - new_top[row])
        mass = (mass * keep).at[row].add(weights.sum(-1) * take)
        mixed = (mixed * keep[..., None]).at[row].add(part_mixed * take[..., None])
        return new_top, mass, mixed

    shape = grouped.shape[:3]
    start = (jnp.full(shape, NEVER), jnp.zeros(shape), jnp.zeros(grouped.shape))
    top, mass, mixed = lax.fori_loop(0, -(-total // visit), body, start)
    if sinks is not None:
        mass, mixed = _with_sinks(sinks.reshape(1, *shape[1:]), top, mass, mixed)
    return (mixed / jnp.maximum(mass, 1e-30)[..., None]).reshape(q.shape).astype(q.dtype)


def _many_token_rows(
    q: jax.Array,
    pages: Pages,
    layer: int,
    ragged: Ragged,
    tables: jax.Array,
    lengths: jax.Array,
    rule: Rule,
    sinks: jax.Array | None,
) -> jax.Array:
    """q: [T, N, H]; visits only the rows with ``lengths`` (i32[B]) above 0, tile by tile."""
    num_tokens, num_heads, head_dim = q.shape
    kv_heads, size = page_sizes(pages)
    group = num_heads // kv_heads
    span, per_span = _span_of(size, TILE_SPAN)
    tile = min(TILE, num_tokens)
    tiles = -(-lengths // tile)  # B
    ends = jnp.cumsum(tiles)
    padded = jnp.pad(q, ((0, tile), (0, 0), (0, 0)))  # the last tile may reach past the last token
    last_row = lengths.shape[0] - 1

    def one_tile(item: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.minimum(jnp.searchsorted(ends, item, side="right"), last_row)
        nth = item - (ends - tiles)[row]
        token = ragged.starts[row] + nth * tile
        here = jnp.minimum(lengths[row] - nth * tile, tile)  # queries of this tile that exist
        position = ragged.context[row] - lengths[row] + nth * tile + jnp.arange(tile)
        queries = lax.dynamic_slice_in_dim(padded, token, tile).astype(jnp.float32) * rule.scale
        queries = queries.reshape(tile, kv_heads, group, head_dim).transpose(1, 2, 0, 3)
        queries = queries.reshape(kv_heads, group * tile, head_dim)
        high = position[0] + here  # keys from here on are seen by no query of this tile
        low = jnp.int32(0) if rule.window is None else jnp.maximum(position[0] - rule.window + 1, 0)

        def one_span(chunk: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
            top, mass, mixed = carry
            place = chunk * span + jnp.arange(span)
            seen = (place[None] <= position[:, None]) & (place < high)[None]
            if rule.window is not None:
                seen &= place[None] > position[:, None] - rule.window
            index = lax.dynamic_slice(tables, (row, chunk * per_span), (1, per_span))
            k, v = (_rows_of(read_rows(pages, index, layer, half))[0] for half in (0, 1))  # K, span, H
            v = jnp.where((place < high)[None, :, None], v, 0)
            scores = _capped(jnp.einsum("kth,ksh->kts", queries, k), rule).reshape(kv_heads, group, tile, span)
            scores = jnp.where(seen[None, None], scores, NEVER)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.where(seen[None, None], jnp.exp(scores - new_top[..., None]), 0)
            keep = jnp.exp(top - new_top)
            part = jnp.einsum("kts,ksh->kth", weights.reshape(kv_heads, group * tile, span), v)
            mixed = mixed * keep[..., None] + part.reshape(kv_heads, group, tile, head_dim)
            return new_top, mass * keep + weights.sum(-1), mixed

        shape = (kv_heads, group, tile)
        start = (jnp.full(shape, NEVER), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
        top, mass, mixed = lax.fori_loop(low // span, -(-high // span), one_span, start)
        if sinks is not None:
            mass, mixed = _with_sinks(sinks.reshape(kv_heads, group, 1), top, mass, mixed)
        result = (mixed / jnp.maximum(mass, 1e-30)[..., None]).transpose(2, 0, 1, 3).reshape(tile, num_heads, head_dim)
        old = lax.dynamic_slice_in_dim(out, token, tile)
        kept = jnp.where((jnp.arange(tile) < here)[:, None, None], result.astype(out.dtype), old)
        return lax.dynamic_update_slice_in_dim(out, kept, token, 0)

    out = lax.fori_loop(0, ends[-1], one_tile, jnp.zeros_like(padded))
    return out[:num_tokens]


def _capped(scores: jax.Array, rule: Rule) -> jax.Array:
    return scores if rule.soft_cap is None else rule.soft_cap * jnp.tanh(scores / rule.soft_cap)


def _with_sinks(sinks: jax.Array, top: jax.Array, mass: jax.Array, mixed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One more score per head in the sum, whose value is zero."""
    new_top = jnp.maximum(top, sinks)
    keep = jnp.exp(top - new_top)
    return mass * keep + jnp.exp(sinks - new_top), mixed * keep[..., None]


def _span_of(size: int, wanted: int) -> tuple[int, int]:
    """Keys per span, about as many as wanted, and pages per span, for pages of ``size`` tokens."""
    per_span = max(1, wanted // size)
    return per_span * size, per_span


def _whole_spans(tables: jax.Array, size: int, longest: int) -> jax.Array:
    """Widen the tables (i32[B, W]) with page 0 to a whole number of the longest spans (powers of two)."""
    return jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % _span_of(size, longest)[1])))


def _rows_of(gathered: jax.Array) -> jax.Array:
    """[n, pages, K, C, H] as gathered -> f32 [n, K, pages * C, H]."""
    num, pages, kv_heads, size, head_dim = gathered.shape
    return gathered.transpose(0, 2, 1, 3, 4).reshape(num, kv_heads, pages * size, head_dim).astype(jnp.float32)
