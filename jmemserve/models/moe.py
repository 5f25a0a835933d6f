"""A mixture of experts: each token goes through the few feed-forward layers that a router picks for it.

The (token, expert) pairs are sorted by expert and cut into tiles of one expert each. Only tiles that exist are visited,
in a loop with a trip count known at run time, so the cost grows with the pairs, and of the experts only those are read
that somebody goes to.

    pairs by expert:   |e0 e0 e0 e0|e2|e3 e3 ...       a tile may reach into the next expert's pairs: those are
                       |tile 0|tile 1|t2|tile 3        written again by the tiles that they belong to
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmemserve.models.config import Experts
from jmemserve.models.ops import Ops

TILE = 64  # pairs


class Matrices(NamedTuple):
    """One per expert."""

    values: jax.Array  # [E, ..., in]
    scale: jax.Array | None  # [E, ..., 1], if they are quantized

    def product(self, expert: jax.Array, x: jax.Array, used: jax.Array, ops: Ops) -> jax.Array:
        """Of one expert's [..., in] with the first columns of x [in, T]: f32[out, T]."""
        out = ops.project_first(self.values[expert].reshape(-1, x.shape[0]), x, used)
        return out if self.scale is None else out * self.scale[expert].reshape(-1, 1)


def mixture(
    experts: Experts, router: jax.Array, gate_up: Matrices, down: Matrices, x: jax.Array, ops: Ops
) -> jax.Array:
    """router [E, D], gate_up [E, F, 2, D], down [E, D, F], x [D, T] -> [D, T]."""
    width, tokens = x.shape
    k, inner = experts.per_token, gate_up.values.shape[1]
    scores = jax.nn.softmax(ops.project(router, x).T, axis=-1)  # T E
    share, chosen = lax.top_k(scores, k)  # T k
    if experts.renormalise:
        share = share / share.sum(-1, keepdims=True)
    pairs = tokens * k
    tile = min(TILE, pairs)
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # of pairs: token * k + place
    counts = jnp.zeros(experts.count, jnp.int32).at[chosen.reshape(-1)].add(1)
    starts = jnp.cumsum(counts) - counts
    tiles = -(-counts // tile)
    ends = jnp.cumsum(tiles)
    columns = jnp.pad(x[:, order // k], ((0, 0), (0, tile)))

    def one_tile(item: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(ends, item, side="right")
        nth = item - (ends - tiles)[expert]
        start, here = starts[expert] + nth * tile, jnp.minimum(counts[expert] - nth * tile, tile)
        given = lax.dynamic_slice_in_dim(columns, start, tile, axis=1)
        both = gate_up.product(expert, given, here, ops).astype(x.dtype).reshape(inner, 2, tile)
        made = down.product(expert, jax.nn.silu(both[:, 0]) * both[:, 1], here, ops)
        return lax.dynamic_update_slice_in_dim(out, made, start, axis=1)

    out = lax.fori_loop(0, ends[-1], one_tile, jnp.zeros((width, pairs + tile), jnp.float32))
    of_pair = out[:, jnp.argsort(order)].reshape(width, tokens, k)
    return jnp.einsum("dtk,tk->dt", of_pair, share, precision="highest").astype(x.dtype)
