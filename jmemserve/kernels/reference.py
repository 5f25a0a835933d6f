"""Paged attention in the plainest way: gather every page of the table, mask, softmax. The slow truth of the tests."""

import jax
import jax.numpy as jnp

from jmemserve.kernels import Ragged
from jmemserve.kernels.pages import Pages, page_sizes, read_rows, write_kv
from jmemserve.kernels.rule import Rule


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
    num_tokens, num_heads, head_dim = q.shape
    num_rows, width = ragged.tables.shape
    kv_heads, size = page_sizes(pages)
    token = jnp.arange(num_tokens)
    row = jnp.clip(jnp.searchsorted(ragged.starts, token, side="right") - 1, 0, num_rows - 1)  # T
    kv = jnp.stack([read_rows(pages, ragged.tables[row], layer, half) for half in (0, 1)], 2)  # T W 2 K C H
    kv = kv.transpose(2, 0, 3, 1, 4, 5).reshape(2, num_tokens, kv_heads, width * size, head_dim)
    grouped = q.reshape(num_tokens, kv_heads, num_heads // kv_heads, head_dim).astype(jnp.float32) * rule.scale
    scores = jnp.einsum("tkgh,tksh->tkgs", grouped, kv[0].astype(jnp.float32), precision="highest")
    if rule.soft_cap is not None:
        scores = rule.soft_cap * jnp.tanh(scores / rule.soft_cap)
    place = jnp.arange(width * size)[None]
    position = ragged.positions[:, None]
    seen = (place <= position) & (place < ragged.context[row][:, None])
    if rule.window is not None:
        seen &= place > position - rule.window
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    if sinks is not None:
        extra = jnp.broadcast_to(sinks.reshape(scores.shape[1:3])[None, ..., None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate((scores, extra), -1)
    weights = jnp.nan_to_num(jax.nn.softmax(scores, axis=-1))[..., : width * size]
    values = jnp.where(seen[:, None, :, None], kv[1].astype(jnp.float32), 0)
    out = jnp.einsum("tkgs,tksh->tkgh", weights, values, precision="highest")
    return out.reshape(q.shape).astype(q.dtype), pages
