"""Rows with one new token: one thread block per (row, kv head, split of the row's keys).

The query heads of a kv head are the rows of one wgmma tile. Its other rows are idle, which is free: at 64 operations
per byte of keys the tile is still bound by memory. A long row is cut into splits where rows and heads alone do not
fill the GPU, and a second small step brings them together.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels.mosaic_gpu.call import launch
from jmemserve.kernels.mosaic_gpu.plan import COLUMNS
from jmemserve.kernels.mosaic_gpu.softmax import finish, nothing_yet
from jmemserve.kernels.mosaic_gpu.step import Keys
from jmemserve.kernels.mosaic_gpu.tiles import ROWS, Plan, attend_spans, copy_spans, wait_for_last
from jmemserve.kernels.mosaic_gpu.work import combine, spans_of_split, splits_of


@functools.partial(jax.jit, static_argnames=("plan", "blocks"))  # traced once for all layers
def one_token_rows(plan: Plan, q: jax.Array, keys: Keys, context: jax.Array, blocks: int):
    """q: [B, K, G, H], context: i32[B], 0 for rows to skip.

    ``blocks``: thread blocks that fill the GPU.

    -> (f32 or q's type [B, K, G, H], log2 of the sum of exponentials f32[B, K, G])
    """
    rows, kv_heads, group, _ = q.shape
    padded = -(-group // 8) * 8  # swizzled memory is copied eight rows at a time
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - group), (0, 0)))
    spans = keys.tables.shape[1] * plan.size // plan.span
    splits = splits_of(rows, kv_heads, spans, blocks)
    out_dtype = plan.dtype if splits == 1 else jnp.dtype(jnp.float32)

    def kernel(
        q_ref, kv_ref, tables_ref, offset_ref, context_ref, out_ref, lse_ref, q_smem, out_smem, lse_smem, q_full, *ring
    ):
        row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
        context, within = context_ref[row], offset_ref[0] + head
        low, first, plain, last = spans_of_split(plan, context, split, splits)
        worker = lax.axis_index("warpgroup")

        @pl.when(worker == 1)
        def copying():
            step = copy_spans(plan, ring, tables_ref, kv_ref, row, within, first, last, jnp.int32(0))
            wait_for_last(plan, ring, step)

        @pl.when(worker == 0)
        def computing():
            plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem.at[pl.ds(0, padded)], q_full)
            plgpu.barrier_wait(q_full)
            limit = plgpu.layout_cast(lax.broadcast(context - 1, (ROWS,)), plgpu.Layout.WGMMA.reduce(1))
            state, _ = attend_spans(
                plan, ring, q_smem, limit, low, context, first, plain, last, nothing_yet(plan), jnp.int32(0)
            )
            out, lse = finish(plan, state)
            lse_smem[...] = lse
            for part, columns in zip(out, plan.parts, strict=True):
                held = out_smem.at[:, pl.ds(0, columns.size)]
                plgpu.wait_smem_to_gmem(0)  # of the part before
                held[...] = part.astype(out_dtype)
                plgpu.commit_smem()

                @pl.when((first < last) | (splits == 1))  # what nobody wrote, ``combine`` does not look at
                def mixed_values(held=held, columns=columns):
                    target = out_ref.at[split, row, head, :, columns]
                    plgpu.copy_smem_to_gmem(held.at[pl.ds(0, padded)], target)

            plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, padded)], lse_ref.at[split, row, head])
            plgpu.wait_smem_to_gmem(0)

    shape = (splits, rows, kv_heads, padded)
    out, lse = launch(
        kernel,
        plan,
        out=[jax.ShapeDtypeStruct((*shape, plan.head), out_dtype), jax.ShapeDtypeStruct(shape, jnp.float32)],
        scratch=[
            plan.swizzled((ROWS, plan.head), plan.dtype),
            plan.swizzled((ROWS, min(plan.head, COLUMNS)), out_dtype),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),
            *plan.ring(),
        ],
        grid={"row": rows, "head": kv_heads, "split": splits},
    )(q, *keys, context)
    return combine(out[..., :group, :], lse[..., :group])
