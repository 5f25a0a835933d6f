"""What the two kernels share: bringing spans of keys and values from their pages, and what is done with each.

A thread block is one warpgroup. Spans go through a ring of slots in shared memory, in one loop:

    ask for the next span -> wait for this one -> scores -> softmax -> weights to shared memory -> mix

Pallas puts a barrier of the warpgroup before every copy, store and wait, so no slot is overwritten while a warp reads.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels.mosaic_ampere.machine import barriers, copy, product, wait
from jmemserve.kernels.mosaic_gpu.plan import Tiling
from jmemserve.kernels.mosaic_gpu.softmax import clean, scaled, weigh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Tiling):
    """What is known when a kernel is compiled."""

    query_rows: int  # 16, of which all four warps take their part of the columns; or 64, 16 for each warp
    barriers: bool  # that copies tell, see ``machine.py``

    @property
    def rows(self) -> int:
        return self.query_rows

    @property
    def row_warps(self) -> int:
        """How many of the four warps have rows of their own."""
        return self.query_rows // 16

    @property
    def layout(self):
        return plgpu.Layout.MMA_ACC(self.dtype, m_warps=self.row_warps)

    def swizzled(self, *shape: int):
        """Shared memory that is read by ldmatrix without conflicts, and that 16 rows can be copied to.

        The four warps share a copy's tiles evenly, so 16 rows need an even number in each row of tiles.
        """
        columns = next((c for c in (64, 32) if shape[-1] % (2 * c) == 0), 16)  # of a tile, in elements of two bytes
        transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)  # type: ignore[abstract]
        return plgpu.SMEM(shape, self.dtype, transforms=transforms)

    def ring(self) -> list:
        """Scratch: keys, values, weights, barriers if copies tell them."""
        spans = self.swizzled(self.slots, self.span, self.head)
        return [spans, spans, self.swizzled(self.rows, self.span), *barriers(self, 2 * self.copies, self.slots)]


def attend_spans(plan: Plan, ring, tables, kv, row, within, queries, limit, low, high, first, plain, last, state):
    """``queries`` ([rows, H] in shared memory) over spans ``first`` to ``last`` of a row of the batch.

    tables: i32[B, W] and kv: [pages and all in them, C, H], both in global memory; within: see ``Tiling.places``.
    limit: i32[rows], the last place that each query sees, -1 for none; before span ``plain`` all see everything. low,
    high: outside of them nobody in the thread block sees a key, and memory may hold anything, even NaN.
    -> the new state (see ``nothing_yet``).
    """
    keys, values, weights_held, *full = ring
    length = min(plan.size, plan.span)
    ahead = plan.slots - 1

    def ask_for(chunk):
        slot = lax.rem(chunk, jnp.int32(plan.slots))
        arrived = [barrier.at[slot] for barrier in full]
        part, places = plan.places(tables, row, within, chunk)
        for number, place in enumerate(places):
            here = pl.ds(number * length, length)
            copy(kv.at[place, part], keys.at[slot, here], arrived)
            copy(kv.at[place + plan.value_offset, part], values.at[slot, here], arrived)

    def one_span(masked, chunk, state):
        mixed, top, mass = state
        slot = lax.rem(chunk, jnp.int32(plan.slots))
        arrived = [barrier.at[slot] for barrier in full]
        more = chunk + ahead < last

        @pl.when(more)
        def _():
            ask_for(chunk + ahead)
            wait(arrived, later=ahead * 2 * plan.copies)

        @pl.when(jnp.logical_not(more))
        def _():
            wait(arrived, later=0)

        begin = chunk * plan.span

        if masked:  # weights of unseen keys are 0, but 0 * NaN is NaN

            @pl.when((begin < low) | (begin + plan.span > high))
            def _():
                clean(values.at[slot], plgpu.Layout.MMA_ACC(plan.dtype, m_warps=1), begin, low, high)

        products = plgpu.layout_cast(jnp.zeros((plan.rows, plan.span), jnp.float32), plan.layout)
        for part in plan.parts:
            products = product(plan, queries.at[:, part], keys.at[slot, :, part].transpose((1, 0)), products)
        weights, keep, top, mass = weigh(plan, products, chunk, limit, top, mass, masked)
        weights_held[...] = weights.astype(plan.dtype)  # their registers are not where mma wants them
        mixed = tuple(
            product(plan, weights_held, values.at[slot, :, part], scaled(held, keep))
            for held, part in zip(mixed, plan.parts, strict=True)
        )
        return mixed, top, mass

    for number in range(ahead):
        pl.when(first + number < last)(partial(ask_for, first + number))
    state = lax.fori_loop(first, plain, partial(one_span, False), state)
    return lax.fori_loop(plain, last, partial(one_span, True), state)
