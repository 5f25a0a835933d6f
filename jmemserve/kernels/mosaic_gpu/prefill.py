"""Rows with several new tokens: one thread block per (tile of queries, kv head), which visits every row in its tile.

The queries of the G heads of a kv head are stacked: token t's head g is row t * G + g of an array [K, T * G, H], which
is cut into tiles at fixed places, so that tiles need no gathering and no masks when they are stored. A tile that holds
parts of several rows goes over the keys of one after another; the queries of the others see nothing meanwhile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels import Ragged
from jmemserve.kernels.mosaic_gpu.call import launch
from jmemserve.kernels.mosaic_gpu.softmax import finish, nothing_yet
from jmemserve.kernels.mosaic_gpu.step import Keys
from jmemserve.kernels.mosaic_gpu.tiles import ROWS, Plan, attend_spans, copy_spans, wait_for_last
from jmemserve.kernels.mosaic_gpu.work import part_of, stack, unstack


@functools.partial(jax.jit, static_argnames="plan")  # traced once for all layers
def many_token_rows(plan: Plan, q: jax.Array, keys: Keys, ragged: Ragged):
    """q: [T, K, G, H]; rows with fewer than two new tokens are skipped.

    -> (q's type [T, K, G, H], log2 of the sum of exponentials f32[T, K, G])
    """
    tokens, kv_heads, group, head_dim = q.shape
    tile = ROWS * plan.warpgroups
    stacked = stack(q, ragged, tile)

    def kernel(
        q_ref, kv_ref, tables_ref, offset_ref, context_ref, starts_ref, rows_ref, owner_ref, positions_ref,
        out_ref, lse_ref,
        q_smem, lse_smem, owner_smem, positions_smem, q_full, *ring,
    ):  # fmt: skip
        # The last tiles, which have most to look at, begin first.
        number, head = stacked.tiles - 1 - lax.axis_index("tile"), lax.axis_index("head")
        within = offset_ref[0] + head
        worker = lax.axis_index("warpgroup")
        first_token = lax.div(number * tile, jnp.int32(group))
        after_token = lax.div(number * tile + (tile - 1), jnp.int32(group)) + 1

        def part(row):
            return part_of(plan, context_ref, starts_ref, row, first_token, after_token, least=2)

        @pl.when(worker == plan.warpgroups)
        def copying():
            plgpu.set_max_registers(40, action="decrease")

            def one_row(row, step):
                _, _, first, _, last = part(row)
                return copy_spans(plan, ring, tables_ref, kv_ref, row, within, first, last, step)

            step = lax.fori_loop(rows_ref[0, number], rows_ref[1, number], one_row, jnp.int32(0))
            wait_for_last(plan, ring, step)

        @pl.when(worker < plan.warpgroups)
        def computing():
            plgpu.set_max_registers(232, action="increase")
            here = pl.ds(number * tile + worker * ROWS, ROWS)
            full, queries = q_full.at[worker], q_smem.at[worker]
            plgpu.copy_gmem_to_smem(q_ref.at[head, here], queries, full)
            plgpu.copy_gmem_to_smem(owner_ref.at[here], owner_smem.at[worker], full)
            plgpu.copy_gmem_to_smem(positions_ref.at[here], positions_smem.at[worker], full)
            plgpu.barrier_wait(full)
            row_layout = plgpu.Layout.WGMMA.reduce(1)
            owners = plgpu.load(owner_smem.at[worker], layout=row_layout)
            places = plgpu.load(positions_smem.at[worker], layout=row_layout)

            def one_row(row, carry):
                *state, step = carry
                low, high, first, plain, last = part(row)
                limit = jnp.where(owners == row, places, -1)
                state, step = attend_spans(
                    plan, ring, queries, limit, low, high, first, plain, last, tuple(state), step
                )
                return (*state, step)

            start = (*nothing_yet(plan), jnp.int32(0))
            *state, _ = lax.fori_loop(rows_ref[0, number], rows_ref[1, number], one_row, start)
            out, lse = finish(plan, tuple(state))
            for mixed, columns in zip(out, plan.parts, strict=True):
                queries[:, columns] = mixed.astype(plan.dtype)
            lse_smem[worker] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(queries, out_ref.at[head, here])
            plgpu.copy_smem_to_gmem(lse_smem.at[worker], lse_ref.at[head, here])
            plgpu.wait_smem_to_gmem(0)

    per_worker = (plan.warpgroups, ROWS)
    out, lse = launch(
        kernel,
        plan,
        out=[
            jax.ShapeDtypeStruct((kv_heads, stacked.tiles * tile, head_dim), plan.dtype),
            jax.ShapeDtypeStruct((kv_heads, stacked.tiles * tile), jnp.float32),
        ],
        scratch=[
            plan.swizzled((*per_worker, plan.head), plan.dtype),
            plgpu.SMEM(per_worker, jnp.float32),
            plgpu.SMEM(per_worker, jnp.int32),
            plgpu.SMEM(per_worker, jnp.int32),
            plgpu.Barrier(num_arrivals=3, num_barriers=plan.warpgroups),
            *plan.ring(),
        ],
        grid={"tile": stacked.tiles, "head": kv_heads},
    )(stacked.queries, *keys, ragged.context, ragged.starts, stacked.rows, stacked.owner, stacked.positions)
    return unstack(out, lse, tokens, group)
