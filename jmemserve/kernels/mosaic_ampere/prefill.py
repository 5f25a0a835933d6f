"""Rows with several new tokens: one thread block per (tile of stacked queries, kv head), which visits every row in its
tile. A tile that holds parts of several rows goes over the keys of one after another; the queries of the others see
nothing meanwhile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels import Ragged
from jmemserve.kernels.mosaic_ampere.launch import launch
from jmemserve.kernels.mosaic_ampere.machine import barriers, copy, store, wait
from jmemserve.kernels.mosaic_ampere.tiles import Plan, attend_spans
from jmemserve.kernels.mosaic_gpu.softmax import finish, nothing_yet
from jmemserve.kernels.mosaic_gpu.step import Keys
from jmemserve.kernels.mosaic_gpu.work import part_of, stack, unstack


@functools.partial(jax.jit, static_argnames="plan")  # traced once for all layers
def many_token_rows(plan: Plan, q: jax.Array, keys: Keys, ragged: Ragged):
    """q: [T, K, G, H]; rows with fewer than two new tokens are skipped.

    -> (q's type [T, K, G, H], log2 of the sum of exponentials f32[T, K, G])
    """
    tokens, kv_heads, group, _ = q.shape
    tile = plan.rows
    stacked = stack(q, ragged, tile)

    def kernel(
        q_ref, kv_ref, tables_ref, offset_ref, context_ref, starts_ref, rows_ref, owner_ref, positions_ref,
        out_ref, lse_ref,
        queries, *rest,
    ):  # fmt: skip
        ring, arrived = (rest[:-1], [rest[-1].at[0]]) if plan.barriers else (rest, [])
        # The last tiles, which have most to look at, begin first.
        number, head = stacked.tiles - 1 - lax.axis_index("tile"), lax.axis_index("head")
        within = offset_ref[0] + head
        first_token = lax.div(number * tile, jnp.int32(group))
        after_token = lax.div(number * tile + (tile - 1), jnp.int32(group)) + 1
        here = pl.ds(number * tile, tile)
        copy(q_ref.at[head, here], queries, arrived)
        wait(arrived, later=0)
        owners, places = (
            plgpu.load(ref.at[here], layout=plan.layout.reduce(1), optimized=False)
            for ref in (owner_ref, positions_ref)
        )

        def one_row(row, state):
            low, high, first, plain, last = part_of(
                plan, context_ref, starts_ref, row, first_token, after_token, least=2
            )
            limit = jnp.where(owners == row, places, -1)
            return attend_spans(
                plan, ring, tables_ref, kv_ref, row, within, queries, limit, low, high, first, plain, last, state
            )

        state = lax.fori_loop(rows_ref[0, number], rows_ref[1, number], one_row, nothing_yet(plan))
        out, lse = finish(plan, state)
        for mixed, columns in zip(out, plan.parts, strict=True):
            store(out_ref.at[head, here, columns], mixed.astype(plan.dtype))
        store(lse_ref.at[head, here], lse)

    length = stacked.tiles * tile
    out, lse = launch(
        kernel,
        plan,
        out=[
            jax.ShapeDtypeStruct((kv_heads, length, plan.head), plan.dtype),
            jax.ShapeDtypeStruct((kv_heads, length), jnp.float32),
        ],
        scratch=[plan.swizzled(tile, plan.head), *plan.ring(), *barriers(plan, 1, 1)],
        grid={"tile": stacked.tiles, "head": kv_heads},
    )(stacked.queries, *keys, ragged.context, ragged.starts, stacked.rows, stacked.owner, stacked.positions)
    return unstack(out, lse, tokens, group)
