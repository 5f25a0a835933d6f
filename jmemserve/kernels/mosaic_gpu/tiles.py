"""What the two kernels share: bringing spans of keys and values from their pages, and the softmax that goes over them.

A thread block has one warpgroup that only copies and one or more that compute, each with 64 query rows (the M of
wgmma). They meet at the slots of a ring in shared memory, each of which holds a span of keys and one of values:

    copying      wait done[slot] -> TMA of the span's pages into the slot -> (arrives at) k_full[slot], v_full[slot]
    computing    wait k_full[slot] -> scores -> softmax -> wait v_full[slot] -> mix -> (arrives at) done[slot]
"""

import dataclasses
import math
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels.rule import Rule

ROWS = 64  # query rows of a warpgroup
COLUMNS = 128  # of a head that one product makes; a head with more is a wide one
NEVER = -1e30  # a score that is never seen; finite, so that rows that see nothing stay finite
_LOG2E = math.log2(math.e)
_ROW = plgpu.Layout.WGMMA.reduce(1)  # one number for every row of a tile


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when a kernel is compiled."""

    rule: Rule
    dtype: jnp.dtype
    head: int
    size: int  # tokens of a page
    span: int  # keys of a span, a multiple of 64
    slots: int
    warpgroups: int  # that compute
    page_stride: int  # from a page to the next, in units of [C, H]
    layer_offset: int  # of the layer's keys of head 0, in the same units
    value_offset: int  # from keys to values, in the same units
    interpret: plgpu.InterpretGPUParams | None

    @property
    def copies(self) -> int:
        """TMA copies, of keys or of values, that fill a span."""
        return max(1, self.span // self.size)

    @property
    def parts(self) -> list:
        """The columns of a head, in slices that are computed one after another."""
        return [pl.ds(start, min(COLUMNS, self.head - start)) for start in range(0, self.head, COLUMNS)]

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


def copy_spans(plan: Plan, ring, tables, kv, row, head, first, last, step):
    """The copying warpgroup's part: spans ``first`` to ``last`` of a row go through the ring; -> the next step.

    tables: i32[B, W] and kv: [pages and all in them, C, H], both in global memory.
    """
    keys, values, k_full, v_full, done, *_ = ring

    length = min(plan.size, plan.span)

    def one_span(chunk, step):
        slot = lax.rem(step, jnp.int32(plan.slots))
        if plan.size <= plan.span:
            part = pl.ds(0, plan.size)
            columns = [chunk * plan.copies + copy for copy in range(plan.copies)]
        else:
            parts = jnp.int32(plan.size // plan.span)
            part = pl.ds(lax.rem(chunk, parts) * plan.span, plan.span)
            columns = [lax.div(chunk, parts)]
        # All of the table's entries before the first copy, and before the wait, so that their latencies overlap.
        places = [tables[row, column] * plan.page_stride + plan.layer_offset + head for column in columns]

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


def nothing_yet(plan: Plan):
    """The softmax before any key, all f32, scores in log2: (mixed values [64, columns] of each of ``plan.parts``, top
    score [64], mass [64])."""
    mixed = tuple(
        plgpu.layout_cast(jnp.zeros((ROWS, part.size), jnp.float32), plgpu.Layout.WGMMA) for part in plan.parts
    )
    top = plgpu.layout_cast(jnp.full((ROWS,), NEVER, jnp.float32), _ROW)
    return mixed, top, plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), _ROW)


def attend_spans(plan: Plan, ring, queries, limit, low, high, first, last, state, step):
    """The computing part: ``queries`` ([64, H] in shared memory) over spans ``first`` to ``last`` of a row.

    limit: i32[64], the last place that each query sees, -1 for none. low, high: outside of them nobody in the thread
    block sees a key, and memory may hold anything, even NaN. -> the new (state, step).
    """
    keys, values, k_full, v_full, done, cleaned, *held_weights = ring
    rule, span, worker = plan.rule, plan.span, lax.axis_index("warpgroup")

    def one_span(chunk, carry):
        mixed, top, mass, step = carry
        slot = lax.rem(step, jnp.int32(plan.slots))
        plgpu.barrier_wait(k_full.at[slot])

        scores = _product(queries, keys.at[slot].transpose((1, 0)), span) * (rule.scale * _LOG2E)
        if rule.soft_cap is not None:
            cap = rule.soft_cap * _LOG2E
            # The GPU's own tanh is good to 2**-11, which is a percent of a weight; its exp2 to 2**-22.
            scores = cap - 2 * cap / (jnp.exp2(scores * (2 * _LOG2E / cap)) + 1)
        place = plgpu.broadcasted_iota(jnp.int32, (ROWS, span), 1, layout=plgpu.Layout.WGMMA) + chunk * span
        furthest = lax.broadcast_in_dim(limit, (ROWS, span), [0])
        seen = place <= furthest
        if rule.window is not None:
            seen = seen & (place > furthest - rule.window)
        scores = jnp.where(seen, scores, NEVER)
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, (ROWS, span), [0]))
        weights = jnp.where(seen, weights, 0.0)
        keep = jnp.exp2(top - new_top)
        mass = mass * keep + weights.sum(axis=1)
        weights = weights.astype(plan.dtype)
        plgpu.barrier_wait(v_full.at[slot])

        # Weights of unseen keys are 0, but 0 * NaN is NaN. Each warpgroup cleans its own parts of the span.
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
            _added(plan, held * lax.broadcast_in_dim(keep, held.shape, [0]), weights, values.at[slot, :, part])
            for held, part in zip(mixed, plan.parts, strict=True)
        )
        plgpu.barrier_arrive(done.at[slot])
        return mixed, new_top, mass, step + 1

    *state, step = lax.fori_loop(first, last, one_span, (*state, step))
    return tuple(state), step


def _clean(plan: Plan, values, chunk, part: int, low, high):
    """Zero the values that nobody sees in one part, of 64 (for registers' sake), of span ``chunk``."""
    for columns in plan.parts:
        shape = (ROWS, columns.size)
        at = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + (chunk * plan.span + part * ROWS)
        held = values.at[pl.ds(part * ROWS, ROWS), columns]
        kept = plgpu.layout_cast(held[...], plgpu.Layout.WGMMA)
        held[...] = jnp.where((at >= low) & (at < high), kept, jnp.zeros(shape, plan.dtype))
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


def finish(plan: Plan, state):
    """-> (outputs f32 [64, columns] of each of ``plan.parts``, log2 of the sum of exponentials [64], about ``NEVER``
    where nothing is seen)."""
    mixed, top, mass = state
    mass = jnp.maximum(mass, 1e-30)
    out = tuple(held / lax.broadcast_in_dim(mass, held.shape, [0]) for held in mixed)
    return out, top + jnp.log2(mass)
