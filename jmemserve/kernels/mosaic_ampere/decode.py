"""Rows with one new token: one thread block per (row, kv head, split of the row's keys).

The query heads of a kv head are the rows of one tile of 16, and each of the four warps takes a part of the keys of a
span, then of the columns of the values: all are read once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jmemserve.kernels.mosaic_ampere.launch import launch
from jmemserve.kernels.mosaic_ampere.machine import barriers, copy, store, wait
from jmemserve.kernels.mosaic_ampere.tiles import Plan, attend_spans
from jmemserve.kernels.mosaic_gpu.softmax import finish, nothing_yet
from jmemserve.kernels.mosaic_gpu.step import Keys
from jmemserve.kernels.mosaic_gpu.work import combine, spans_of_split, splits_of

BLOCKS = 108  # thread blocks that give every multiprocessor of an A100 one; others have 20 to 142


@functools.partial(jax.jit, static_argnames="plan")  # traced once for all layers
def one_token_rows(plan: Plan, q: jax.Array, keys: Keys, context: jax.Array):
    """q: [B, K, G, H], context: i32[B], 0 for rows to skip.

    -> (f32 or q's type [B, K, G, H], log2 of the sum of exponentials f32[B, K, G])
    """
    rows, kv_heads, group, _ = q.shape
    q = jnp.pad(q, ((0, 0), (0, 0), (0, plan.rows - group), (0, 0)))
    spans = keys.tables.shape[1] * plan.size // plan.span
    splits = splits_of(rows, kv_heads, spans, BLOCKS)
    out_dtype = plan.dtype if splits == 1 else jnp.dtype(jnp.float32)

    def kernel(q_ref, kv_ref, tables_ref, offset_ref, context_ref, out_ref, lse_ref, queries, *rest):
        ring, arrived = (rest[:-1], [rest[-1].at[0]]) if plan.barriers else (rest, [])
        row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
        context, within = context_ref[row], offset_ref[0] + head
        low, first, plain, last = spans_of_split(plan, context, split, splits)
        copy(q_ref.at[row, head], queries, arrived)
        wait(arrived, later=0)
        limit = lax.broadcast(context - 1, (plan.rows,))
        begin = nothing_yet(plan)
        state = attend_spans(
            plan, ring, tables_ref, kv_ref, row, within, queries, limit, low, context, first, plain, last, begin
        )
        out, lse = finish(plan, state)

        @pl.when((first < last) | (splits == 1))  # what nobody wrote, ``combine`` does not look at
        def _():
            for mixed, columns in zip(out, plan.parts, strict=True):
                store(out_ref.at[split, row, head, :, columns], mixed.astype(out_dtype))

        store(lse_ref.at[split, row, head], lse)

    shape = (splits, rows, kv_heads, plan.rows)
    out, lse = launch(
        kernel,
        plan,
        out=[jax.ShapeDtypeStruct((*shape, plan.head), out_dtype), jax.ShapeDtypeStruct(shape, jnp.float32)],
        scratch=[plan.swizzled(plan.rows, plan.head), *plan.ring(), *barriers(plan, 1, 1)],
        grid={"row": rows, "head": kv_heads, "split": splits},
    )(q, *keys, context)
    return combine(out[..., :group, :], lse[..., :group])
