"""Paged attention in the plainest way: gather every page of the table, mask, softmax. The slow truth of the tests."""

import jax
import jax.numpy as jnp

from jmemserve.kernels import Ragged
from jmemserve.kernels.pages import Pages, page_sizes, read_rows


def paged_attention(q: jax.Array, pages: Pages, layer: int, ragged: Ragged, window: int | None) -> jax.Array:
    """See ``jmemserve.kernels.Attention``."""
    num_tokens, num_heads, head_dim = q.shape
    num_rows, width = ragged.tables.shape
    kv_heads, size = page_sizes(pages)
    token = jnp.arange(num_tokens)
    row = jnp.clip(jnp.searchsorted(ragged.starts, token, side="right") - 1, 0, num_rows - 1)  # T
    kv = jnp.stack([read_rows(pages, ragged.tables[row], layer, half) for half in (0, 1)], 2)  # T W 2 K C H
    kv = kv.transpose(2, 0, 3, 1, 4, 5).reshape(2, num_tokens, kv_heads, width * size, head_dim)
    grouped = q.reshape(num_tokens, kv_heads, num_heads // kv_heads, head_dim).astype(jnp.float32) * head_dim**-0.5
    scores = jnp.einsum("tkgh,tksh->tkgs", grouped, kv[0].astype(jnp.float32), precision="highest")
    place = jnp.arange(width * size)[None]
    position = ragged.positions[:, None]
    seen = (place <= position) & (place < ragged.context[row][:, None])
    if window is not None:
        seen &= place > position - window
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    weights = jnp.nan_to_num(jax.nn.softmax(scores, axis=-1))
    values = jnp.where(seen[:, None, :, None], kv[1].astype(jnp.float32), 0)
    out = jnp.einsum("tkgs,tksh->tkgh", weights, values, precision="highest")
    return out.reshape(q.shape).astype(q.dtype)
