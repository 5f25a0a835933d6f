"""A mixture of experts: each token goes through the few feed-forward layers that a router picks for it.

What the chosen ones make is left to ``Ops.mix``. Here is how CPUs do it: the (token, expert) pairs are sorted by expert
and cut into tiles of one expert each. Only tiles that exist are visited, in a loop with a trip count known at run time,
so the cost grows with the pairs, and of the experts only those are read that somebody goes to.

    pairs by expert:   |e0 e0 e0 e0|e2|e3 e3 ...       a tile may reach into the next expert's pairs: those are
                       |tile 0|tile 1|t2|tile 3        written again by the tiles that they belong to
"""

import jax
import jax.numpy as jnp
from jax import lax

from jmemserve.models.config import Experts
from jmemserve.models.experts import Matrices, Routes, sort
from jmemserve.models.ops import Ops, ProjectFirst, project_first

TILE = 64  # pairs


def mixture(
    experts: Experts, router: jax.Array, gate_up: Matrices, down: Matrices, x: jax.Array, ops: Ops
) -> jax.Array:
    """router [E, D], gate_up [E, F, 2, D], down [E, D, F], x [D, T] -> [D, T]."""
    scores = jax.nn.softmax(ops.project(router, x).T, axis=-1)  # T E
    share, chosen = lax.top_k(scores, experts.per_token)  # T k
    if experts.renormalise:
        share = share / share.sum(-1, keepdims=True)
    if ops.used is not None:
        chosen = jnp.where(jnp.arange(x.shape[1])[:, None] < ops.used, chosen, experts.count)
    routes = Routes(chosen, share)
    if ops.mix is not None:
        return ops.mix(gate_up, down, x, routes).astype(x.dtype)
    return by_tiles(gate_up, down, x, routes, ops.project_first).astype(x.dtype)


def by_tiles(
    gate_up: Matrices,
    down: Matrices,
    x: jax.Array,
    routes: Routes,
    product: ProjectFirst = project_first,
    longest: int = TILE,
) -> jax.Array:
    """gate_up [E, F, 2, D], down [E, D, F], x [D, T] -> f32[D, T]; ``longest``: pairs of a tile."""
    width, tokens = x.shape
    count, inner = gate_up.values.shape[:2]
    k = routes.chosen.shape[1]
    pairs = tokens * k
    tile = min(longest, pairs)
    order, counts, starts = sort(routes, count)
    tiles = -(-counts // tile)
    ends = jnp.cumsum(tiles)
    columns = jnp.pad(x[:, order // k], ((0, 0), (0, tile)))

    def of_one(matrices: Matrices, expert: jax.Array, x: jax.Array, used: jax.Array) -> jax.Array:
        """[..., in] of an expert with the first columns of x [in, T]: f32[out, T]."""
        out = product(matrices.values[expert].reshape(-1, x.shape[0]), x, used)
        return out if matrices.scale is None else out * matrices.scale[expert].reshape(-1, 1)

    def one_tile(item: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.sum(ends <= item)
        nth = item - (ends - tiles)[expert]
        start, here = starts[expert] + nth * tile, jnp.minimum(counts[expert] - nth * tile, tile)
        given = lax.dynamic_slice_in_dim(columns, start, tile, axis=1)
        both = of_one(gate_up, expert, given, here).astype(x.dtype).reshape(inner, 2, tile)
        made = of_one(down, expert, jax.nn.silu(both[:, 0]) * both[:, 1], here)
        return lax.dynamic_update_slice_in_dim(out, made, start, axis=1)

    out = lax.fori_loop(0, ends[-1], one_tile, jnp.zeros((width, pairs + tile), jnp.float32))
    # Nobody's pairs come last, where the last tile may have reached; no tile reaches the last column.
    at = jnp.where(routes.chosen.reshape(-1) < count, jnp.argsort(order), pairs + tile - 1)
    of_pair = out[:, at].reshape(width, tokens, k)
    return jnp.einsum("dtk,tk->dt", of_pair, routes.share, precision="highest")
