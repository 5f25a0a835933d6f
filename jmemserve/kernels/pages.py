"""How a block is laid out in memory. Nothing else knows, but the attention kernels.

    aggregated    one array [P, L, 2, K, C, H]          a block is one contiguous page of all layers
    discrete      L arrays  [P, 2, K, C, H], a tuple     a block is 2L runs of bytes, one per layer and half

    L layer, 2 key or value ("half"), K kv head, C token in the block, H head dim

A layout may be folded: F tokens lie side by side in a row, [.., C/F, F * H] instead of [.., C, H], the same bytes in
the same order. TPUs have it so where a head is smaller than a register is wide.

Outside of the pages a block has the same shape in every layout: [L, 2, K, C, H].
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

Pages = jax.Array | tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class PageLayout:
    """What a block holds. Two pools can exchange blocks if all is equal but how pages lie, the last two."""

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: str
    aggregated: bool = True  # how pages lie in device memory
    fold: int = 1  # F, likewise

    @property
    def page_shape(self) -> tuple[int, ...]:
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def bytes_per_block(self) -> int:
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return per_token * self.block_size * jnp.dtype(self.dtype).itemsize

    def zeros(self, num_pages: int) -> Pages:
        """Empty pages."""
        own = (2, self.num_kv_heads, self.block_size // self.fold, self.head_dim * self.fold)
        if self.aggregated:
            return jnp.zeros((num_pages, self.num_layers, *own), self.dtype)
        return tuple(jnp.zeros((num_pages, *own), self.dtype) for _ in range(self.num_layers))


def page_axes(aggregated: bool) -> tuple[str | None, ...]:
    """The mesh axis of every axis of the pages: kv heads are sharded by tensor parallelism."""
    return (None, None, None, "model", None, None) if aggregated else (None, None, "model", None, None)


def page_sizes(pages: Pages) -> tuple[int, int]:
    """(kv heads, tokens per block)."""
    kv_heads, size, _ = (pages[0] if isinstance(pages, tuple) else pages).shape[-3:]
    return kv_heads, size


def read_rows(pages: Pages, index: jax.Array, layer: int, half: int) -> jax.Array:
    """Keys (half 0) or values (1) of one layer, of the pages in ``index``: [*index.shape, K, C, H]."""
    return pages[layer][index, half] if isinstance(pages, tuple) else pages[index, layer, half]


def write_kv(pages: Pages, layer: int, slots: jax.Array, k: jax.Array, v: jax.Array) -> Pages:
    """Put k and v ([T, K, H]) of one layer into their slots (i32[T]). In place when ``pages`` is donated."""
    _, size = page_sizes(pages)
    page, offset = slots // size, slots % size
    kv = jnp.stack((k, v), 1).astype(jax.tree.leaves(pages)[0].dtype)  # T 2 K H
    # Only tokens of padding share a slot, and nobody reads that one. XLA would write what may be shared atomically.
    how: dict = {"unique_indices": True, "mode": "promise_in_bounds"}
    if isinstance(pages, tuple):
        own = pages[layer].at[page, :, :, offset].set(kv, **how)
        return (*pages[:layer], own, *pages[layer + 1 :])
    return pages.at[page, layer, :, :, offset].set(kv, **how)


# Blocks are moved at numbers that are in the pages, and no two are put into one page but page 0, where either may stay.
# XLA is told so: on GPUs it would else write numbers of 16 bits one by one, by compare-and-swap.


def gather_blocks(pages: Pages, indices: jax.Array, fold: int = 1) -> jax.Array:
    """Copy blocks out: indices i32[n] -> [n, L, 2, K, C, H]."""
    if isinstance(pages, tuple):
        return _unfolded(jnp.stack([_taken(own, indices) for own in pages], 1), fold)
    return _unfolded(_taken(pages, indices), fold)


def scatter_blocks(pages: Pages, indices: jax.Array, blocks: jax.Array) -> Pages:
    """Copy blocks in; in place when ``pages`` is donated."""
    if isinstance(pages, tuple):
        return tuple(_put(own, blocks[:, layer], indices) for layer, own in enumerate(pages))
    return _put(pages, blocks, indices)


def gather_part(pages: jax.Array, indices: jax.Array, *part: jax.Array, fold: int = 1) -> jax.Array:
    """Copy one layer's keys or values out: [n, K, C, H]. ``part``: (layer, half) of aggregated pages, (half,) of a
    layer's own."""
    return _unfolded(_taken(pages, indices, *part), fold)


def scatter_part(pages: jax.Array, indices: jax.Array, blocks: jax.Array, *part: jax.Array) -> jax.Array:
    """Copy one layer's keys or values in; in place when ``pages`` is donated."""
    return _put(pages, blocks, indices, *part)


def _taken(pages: jax.Array, *place: jax.Array) -> jax.Array:
    return pages.at[place].get(mode="promise_in_bounds")


def _put(pages: jax.Array, blocks: jax.Array, *place: jax.Array) -> jax.Array:
    """Blocks [..., C, H], folded as the pages are."""
    folded = blocks.reshape(*blocks.shape[:-2], *pages.shape[-2:])
    return pages.at[place].set(folded, mode="promise_in_bounds", unique_indices=True)


def _unfolded(blocks: jax.Array, fold: int) -> jax.Array:
    """[..., C/F, F * H] -> [..., C, H]."""
    *lead, rows, lanes = blocks.shape
    return blocks.reshape(*lead, rows * fold, lanes // fold)


# -- checksums ---------------------------------------------------------------------------------------------------------

_MULTIPLIER = 0x9E3779B1
_PER_ROW = 2 * _MULTIPLIER % 2**32
_ROW = 512  # words; on the host a block is summed by rows and by columns


def _weights(place: jax.Array | np.ndarray):
    """An odd number for every place of a 32-bit word in a block: one term by row, one by column."""
    return (place % _ROW * np.uint32(_MULTIPLIER) | np.uint32(1)) + place // _ROW * np.uint32(_PER_ROW)


def block_checksums(blocks: jax.Array, first_head: jax.Array, num_heads: int) -> jax.Array:
    """Sum over all 32-bit words of a block of (word * an odd number that depends on its place), mod 2**32.

    blocks: [n, ..., K', C, H], the kv heads first_head .. first_head + K' of num_heads; -> u32[n]. Sums of the shards
    of a block add up to that of the block, so no device needs to hear from another.
    """
    per_word = 4 // blocks.dtype.itemsize
    shape = (*blocks.shape[:-1], blocks.shape[-1] // per_word)
    grouped = blocks.reshape(*shape, per_word) if per_word > 1 else blocks
    words = jax.lax.bitcast_convert_type(grouped, jnp.uint32)
    inner = words.shape[1:]
    place, stride = jnp.zeros(inner, jnp.uint32), 1
    for axis in reversed(range(len(inner))):
        steps = jax.lax.broadcasted_iota(jnp.uint32, inner, axis)
        if axis == len(inner) - 3:
            steps = steps + first_head.astype(jnp.uint32)
        place = place + steps * jnp.uint32(stride)
        stride *= num_heads if axis == len(inner) - 3 else inner[axis]
    return jnp.sum(words * _weights(place)[None], axis=tuple(range(1, words.ndim)), dtype=jnp.uint32)


def host_checksums(blocks: np.ndarray) -> np.ndarray:
    """The same for whole blocks on the host: [n, ..., K, C, H] -> u32[n]."""
    sums = np.zeros(len(blocks), np.uint32)
    for number, block in enumerate(blocks):
        words = np.ascontiguousarray(block).reshape(-1).view(np.uint32)
        whole = len(words) // _ROW * _ROW
        rows, rest = words[:whole].reshape(-1, _ROW), words[whole:]
        by_column = rows.sum(0, dtype=np.uint32) * _weights(np.arange(_ROW, dtype=np.uint32))
        by_row = rows.sum(1, dtype=np.uint32) * (np.arange(len(rows), dtype=np.uint32) * np.uint32(_PER_ROW))
        last = rest * _weights(np.arange(whole, len(words), dtype=np.uint32))
        sums[number] = sum(int(part.sum(dtype=np.uint32)) for part in (by_column, by_row, last)) % 2**32
    return sums
