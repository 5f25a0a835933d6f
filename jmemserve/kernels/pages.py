"""How a block is laid out in memory. Nothing else knows, but the attention kernels.

page: [L, 2, K, C, H]    layer, key or value, kv head, token, head dim
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, slots=True)
class PageLayout:
    """What a block holds. Two pools can exchange blocks if and only if their layouts are equal."""

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: str

    @property
    def page_shape(self) -> tuple[int, ...]:
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def bytes_per_block(self) -> int:
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return per_token * self.block_size * jnp.dtype(self.dtype).itemsize


KV_HEAD_AXIS = 3  # of the pages array [P, L, 2, K, C, H]: the axis that tensor parallelism shards


def write_kv(pages: jax.Array, layer: int, slots: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Put k and v ([T, K, H]) of one layer into their slots (i32[T]). In place when ``pages`` is donated."""
    size = pages.shape[4]
    page, offset = slots // size, slots % size
    pages = pages.at[page, layer, 0, :, offset].set(k.astype(pages.dtype))
    return pages.at[page, layer, 1, :, offset].set(v.astype(pages.dtype))


def gather_blocks(pages: jax.Array, indices: jax.Array) -> jax.Array:
    """Copy blocks out: indices i32[n] -> [n, L, 2, K, C, H]."""
    return pages[indices]


def scatter_blocks(pages: jax.Array, indices: jax.Array, blocks: jax.Array) -> jax.Array:
    """Copy blocks in; in place when ``pages`` is donated."""
    return pages.at[indices].set(blocks)
