"""Who does what: splits of rows with one new token, tiles of stacked queries of the others."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jmemserve.kernels import Ragged
from jmemserve.kernels.mosaic_gpu.plan import Tiling
from jmemserve.kernels.mosaic_gpu.softmax import NEVER

# -- rows with one new token -------------------------------------------------------------------------------------------

SHORTEST = 4  # spans that a split has to be worth
LONGEST = 64  # spans after which a row is cut even if others fill the GPU, for they may be short


def splits_of(rows: int, kv_heads: int, spans: int, blocks: int) -> int:
    """Splits per row, from what is known when compiling.

    ``spans``: of the longest row that the table can hold; ``blocks``: thread blocks that fill the GPU.
    """
    wanted = max(-(-blocks // (rows * kv_heads)), -(-spans // LONGEST))
    return max(1, min(wanted, spans // SHORTEST))


def spans_of_split(plan: Tiling, context, split, splits: int):
    """In a kernel: (first place that the row's new token sees, first span of the split, the one after its last)."""
    low = jnp.int32(0) if plan.rule.window is None else jnp.maximum(context - plan.rule.window, 0)
    begin = lax.div(low, jnp.int32(plan.span))
    count = lax.div(context + (plan.span - 1), jnp.int32(plan.span)) - begin
    share = jnp.maximum(lax.div(count + (splits - 1), jnp.int32(splits)), SHORTEST if splits > 1 else 0)
    return low, begin + jnp.minimum(split * share, count), begin + jnp.minimum(split * share + share, count)


def combine(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The splits (leading axis) of rows brought together: [S, ..., H] and f32[S, ...] -> [..., H] and f32[...]."""
    if out.shape[0] == 1:
        return out[0], lse[0]
    top = lse.max(0, keepdims=True)
    some = lse > NEVER / 2  # of the others nothing was written
    weights = jnp.where(some, jnp.exp2(lse - top), 0)
    mass = jnp.maximum(weights.sum(0), 1e-30)
    mixed = jnp.where(some[..., None], out * weights[..., None], 0).sum(0)
    return mixed / mass[..., None], top[0] + jnp.log2(mass)


# -- rows with several -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stacked:
    """The queries of the G heads of a kv head, stacked: token t's head g is row t * G + g.

    They are cut into tiles at fixed places, so that tiles need no gathering and no masks when they are stored.
    """

    queries: jax.Array  # [K, tiles * tile, H]
    owner: jax.Array  # i32[tiles * tile] the row of the batch that a stacked row belongs to, B if none
    positions: jax.Array  # i32[tiles * tile] of its token in the sequence
    rows: jax.Array  # i32[2, tiles] first row of the batch in each tile, and the one after the last
    tiles: int


def stack(q: jax.Array, ragged: Ragged, tile: int) -> Stacked:
    """q: [T, K, G, H] in tiles of ``tile`` stacked rows."""
    tokens, kv_heads, group, head_dim = q.shape
    tiles = -(-tokens * group // tile)
    padding = tiles * tile - tokens * group
    stacked = jnp.pad(q.transpose(1, 0, 2, 3).reshape(kv_heads, -1, head_dim), ((0, 0), (0, padding), (0, 0)))
    place = jnp.arange(tiles * tile) // group  # the token of every stacked row
    # Compared with all at once: a binary search is a loop, which the host of a GPU has to drive.
    owner = jnp.searchsorted(ragged.starts, place, side="right", method="compare_all").astype(jnp.int32) - 1
    positions = jnp.pad(ragged.positions, (0, 1))[jnp.minimum(place, tokens)]
    edges = jnp.arange(tiles) * tile
    used = ragged.starts[-1]
    begin = edges // group  # first token of each tile, and below the one after its last
    end = jnp.minimum((edges + tile - 1) // group + 1, used)
    both = jnp.stack((begin, end - 1))
    rows = jnp.searchsorted(ragged.starts, both, side="right", method="compare_all").astype(jnp.int32) - 1
    rows = jnp.stack((rows[0], jnp.where(begin < end, rows[1] + 1, rows[0])))
    return Stacked(stacked, owner, positions, rows, tiles)


def unstack(out: jax.Array, lse: jax.Array, tokens: int, group: int) -> tuple[jax.Array, jax.Array]:
    """[K, tiles * tile, H] and [K, tiles * tile] -> [T, K, G, H] and [T, K, G]."""
    kv_heads, _, head_dim = out.shape
    out = out[:, : tokens * group].reshape(kv_heads, tokens, group, head_dim).transpose(1, 0, 2, 3)
    return out, lse[:, : tokens * group].reshape(kv_heads, tokens, group).transpose(1, 0, 2)


def part_of(plan: Tiling, context, starts, row, first_token, after_token, least: int):
    """In a kernel, of a row's keys those for a tile of tokens: (low, high, first span, the one after the last).

    context: i32[B] and starts: i32[B + 1] in global memory; rows with fewer than ``least`` new tokens have no span.
    Outside of low to high no token of the tile sees a key.
    """
    start, stop = starts[row], starts[row + 1]
    to_place = context[row] - stop  # of a token
    low = jnp.int32(0)
    if plan.rule.window is not None:
        low = jnp.maximum(jnp.maximum(start, first_token) + to_place - plan.rule.window + 1, 0)
    furthest = jnp.minimum(stop, after_token) + to_place
    last = jnp.where(stop - start < least, 0, lax.div(furthest + (plan.span - 1), jnp.int32(plan.span)))
    return low, furthest, lax.div(low, jnp.int32(plan.span)), last
