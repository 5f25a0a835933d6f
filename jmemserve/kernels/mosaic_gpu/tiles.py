"""What the two kernels share: bringing spans of keys and values from their pages, and the softmax that goes over them.

A thread block has one warpgroup that only copies and one or more that compute, each with 64 query rows (the M of
wgmma). They meet at the slots of a ring in shared memory, each of which holds a span of keys and one of values:

    copying      wait done[slot] -> TMA of the span's pages into the slot -> (arrives at) k_full[slot], v_full[slot]
    computing    wait k_full[slot] -> scores -> softmax -> wait v_full[slot] -> mix -> (arrives at) done[slot]
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels.mosaic_gpu.plan import COLUMNS, Tiling
from jmemserve.kernels.mosaic_gpu.softmax import clean, scaled, weigh

ROWS = 64  # query rows of a warpgroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Tiling):
    """What is known when a kernel is compiled; a span is a multiple of 64 keys."""

    warpgroups: int  # that compute

    @property
    def rows(self) -> int:
        return ROWS

    @property
    def layout(self):
        return plgpu.Layout.WGMMA

    def swizzled(self, shape: tuple[int, ...], dtype: jnp.dtype):
        """Shared memory as wgmma wants its operands: in tiles as wide as a swizzle, of which a row has whole ones."""
        itemsize = jnp.dtype(dtype).itemsize
        swizzle = next(wide for wide in (128, 64, 32) if shape[-1] * itemsize % wide == 0)
        tiling = (8, swizzle // itemsize)
        transforms = plgpu.TilingTransform(tiling), plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    def ring(self) -> list:
        """Scratch: keys, values, k_full, v_full, done, cleaned; for the interpreter's wgmma also weights."""
        spans = self.swizzled((self.slots, self.span, self.head), self.dtype)
        full = plgpu.Barrier(num_arrivals=self.copies, num_barriers=self.slots)
        done = plgpu.Barrier(num_arrivals=self.warpgroups, num_barriers=self.slots)
        weights = [self.swizzled((self.warpgroups, ROWS, self.span), self.dtype)] if self.interpret else []
        return [spans, spans, full, full, done, plgpu.Barrier(num_arrivals=self.warpgroups), *weights]


def copy_spans(plan: Plan, ring, tables, kv, row, within, first, last, step):
    """The copying warpgroup's part: spans ``first`` to ``last`` of a row go through the ring; -> the next step.

    tables: i32[B, W] and kv: [pages and all in them, C, H], both in global memory; within: see ``Tiling.places``.
    """
    keys, values, k_full, v_full, done, *_ = ring

    length = min(plan.size, plan.span)

    def one_span(chunk, step):
        slot = lax.rem(step, jnp.int32(plan.slots))
        part, places = plan.places(tables, row, within, chunk)  # before the wait, so that latencies overlap

        @pl.when(step >= plan.slots)
        def _():
            plgpu.barrier_wait(done.at[slot])

        for offset, held, full in ((0, keys, k_full), (plan.value_offset, values, v_full)):
            for copy, place in enumerate(places):
                target = held.at[slot, pl.ds(copy * length, length)]
                plgpu.copy_gmem_to_smem(kv.at[place + offset, part], target, full.at[slot])
        return step + 1

    return lax.fori_loop(first, last, one_span, step)


def wait_for_last(plan: Plan, ring, step):
    """The copying warpgroup, at its end: every slot is done with, so that no barrier goes away in use."""
    done = ring[4]
    for slot in range(plan.slots):

        @pl.when(step > slot)
        def _(slot=slot):
            plgpu.barrier_wait(done.at[slot])


def attend_spans(plan: Plan, ring, queries, limit, low, high, first, plain, last, state, step):
    """The computing part: ``queries`` ([64, H] in shared memory) over spans ``first`` to ``last`` of a row.

    limit: i32[64], the last place that each query sees, -1 for none; before span ``plain`` all see everything. low,
    high: outside of them nobody in the thread block sees a key, and memory may hold anything, even NaN.
    -> the new (state, step).
    """
    keys, values, k_full, v_full, done, cleaned, *held_weights = ring
    span, worker = plan.span, lax.axis_index("warpgroup")

    def one_span(masked, chunk, carry):
        mixed, top, mass, step = carry
        slot = lax.rem(step, jnp.int32(plan.slots))
        plgpu.barrier_wait(k_full.at[slot])

        products = _product(queries, keys.at[slot].transpose((1, 0)), span)
        weights, keep, new_top, mass = weigh(plan, products, chunk, limit, top, mass, masked)
        weights = weights.astype(plan.dtype)
        plgpu.barrier_wait(v_full.at[slot])

        if masked:  # weights of unseen keys are 0, but 0 * NaN is NaN; each warpgroup cleans its own parts of the span

            @pl.when((chunk * span < low) | (chunk * span + span > high))
            def _():
                for part in range(span // ROWS):
                    pl.when(worker == part % plan.warpgroups)(
                        partial(_clean, plan, values.at[slot], chunk, part, low, high)
                    )
                plgpu.barrier_arrive(cleaned)
                plgpu.barrier_wait(cleaned)

        for held in held_weights:
            weights = _kept(held.at[worker], weights)
        mixed = tuple(
            _added(plan, scaled(held, keep), weights, values.at[slot, :, part])
            for held, part in zip(mixed, plan.parts, strict=True)
        )
        plgpu.barrier_arrive(done.at[slot])
        return mixed, new_top, mass, step + 1

    carry = lax.fori_loop(first, plain, partial(one_span, False), (*state, step))
    *state, step = lax.fori_loop(plain, last, partial(one_span, True), carry)
    return tuple(state), step


def _clean(plan: Plan, values, chunk, part: int, low, high):
    """Zero the values that nobody sees in one part, of 64 (for registers' sake), of span ``chunk``."""
    first = chunk * plan.span + part * ROWS
    for columns in plan.parts:
        clean(values.at[pl.ds(part * ROWS, ROWS), columns], plan.layout, first, low, high)
    plgpu.commit_smem()


def _product(left, right, columns: int):
    """left [64, n] (registers or shared memory) times right [n, columns] (shared memory) -> f32 [64, columns]."""

    def run(acc):
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, columns), jnp.float32))


def _added(plan: Plan, total, left, right):
    """``total`` and the product of left and right; of a wide head summed in its registers, as two would not fit."""
    if plan.head <= COLUMNS or plan.interpret:  # the interpreter has no accumulators that begin with something
        return total + _product(left, right, total.shape[1])
    return pl.run_state(lambda acc: plgpu.wgmma(acc, left, right))(plgpu.ACC.init(total))


def _kept(memory, weights):
    """The weights as the interpreter's wgmma takes them."""
    memory[...] = weights
    plgpu.commit_smem()
    return memory
