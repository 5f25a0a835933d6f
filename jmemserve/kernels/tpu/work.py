"""How a batch is cut for the kernels: plain XLA operations on a few integers, the same for all layers of a step.

    rows, packed       |aaaaa|b|ccc|                     T tokens
    rows, aligned      |aaaaa...|b...|ccc.|              R places; a row begins at a whole number of registers
    items              |aaaa|a...|b...|ccc.|             at most a tile of one row's tokens each, in packed order

Padding the rows costs a copy of the queries and lets the kernel move an item by one DMA, wherever the row begins.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jmemserve.kernels import Ragged

LANES = 128  # of a register
SUBLANES = 8  # rows of a register, of 32-bit words; the least that memory is laid out in, of any type
TILE = 128  # new tokens of an item, where a row has several
_MAX_ROWS = 1024  # tokens times group of an item: what fits in VMEM beside the keys


def packing(dtype: str) -> int:
    """Rows of a register (its sublanes, times the numbers in a word): a DMA begins and ends at a multiple."""
    return 32 // jnp.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Static sizes, in tokens."""

    align: int  # a row begins at a multiple; also the size of a small item
    tile: int  # the size of any other item, a multiple of align
    places: int  # R, enough for every batch of this shape, and one tile more
    items: int  # enough for every batch of this shape


@dataclasses.dataclass(frozen=True)
class Work:
    """The items, and where tokens are in the aligned order."""

    items: jax.Array  # i32[4 * M + 1]: row, place, position and new tokens of each; at last how many there are
    token: jax.Array  # i32[R] of each place; any token where there is none
    place: jax.Array  # i32[T] of each token; any place for tokens of padding, and of rows that are not cut


def tiling(num_tokens: int, num_rows: int, at_once: int, group: int, dtype: str) -> Tiling:
    """For steps of that shape, ``at_once`` rows of it; group: query heads per kv head, dtype: of the queries."""
    packed = packing(dtype)
    align = packed // math.gcd(packed, group)
    if num_tokens == num_rows:  # every row has at most one token
        return Tiling(align, align, at_once * align, at_once)
    longest = min(TILE, max(_MAX_ROWS // group, 1), num_tokens)
    tile = max(longest // align, 1) * align
    places = -(-(num_tokens + at_once * (align - 1)) // align) * align + tile
    return Tiling(align, tile, places, min(num_tokens, num_tokens // tile + at_once))


def cut(ragged: Ragged, sizes: Tiling) -> Work:
    """The items of a batch, or of some rows of one. Rows without a new token have none."""
    starts, lengths = ragged.starts[:-1], ragged.starts[1:] - ragged.starts[:-1]
    last_row = lengths.shape[0] - 1
    aligned = -(-lengths // sizes.align) * sizes.align
    place_ends = jnp.cumsum(aligned)
    first_place = place_ends - aligned
    tiles = -(-lengths // sizes.tile)
    ends = jnp.cumsum(tiles)

    item = jnp.arange(sizes.items, dtype=jnp.int32)
    row = jnp.minimum(_count_below(ends, item), last_row)
    done = (item - (ends - tiles)[row]) * sizes.tile  # tokens of the row in items before
    position = ragged.context[row] - lengths[row] + done
    here = jnp.minimum(lengths[row] - done, sizes.tile)
    fields = jnp.stack((row, first_place[row] + done, position, here), 1).reshape(-1)

    place = jnp.arange(sizes.places, dtype=jnp.int32)
    row = jnp.minimum(_count_below(place_ends, place), last_row)
    last_token = ragged.positions.shape[0] - 1
    token = jnp.clip(starts[row] + place - first_place[row], 0, last_token)
    number = jnp.arange(last_token + 1, dtype=jnp.int32)
    row = jnp.minimum(_count_below(ragged.starts[1:], number), last_row)
    back = jnp.clip(first_place[row] + number - starts[row], 0, sizes.places - 1)
    return Work(jnp.append(fields, ends[-1]).astype(jnp.int32), token, back)


def _count_below(ends: jax.Array, x: jax.Array) -> jax.Array:
    """How many of ``ends`` are at most x: the row that x is in."""
    return jnp.sum(ends[None] <= x[:, None], 1, dtype=jnp.int32)
