"""The attention kernel: a loop over items, in each a loop over spans of keys, with the next DMA always under way.

    one page    [2, K', C/F, F * H]   K' kv heads (as many as VMEM allows) in one DMA; F tokens are folded into a row
    one span    as many pages as make SPAN keys; only those with a key that the item sees are read
    one item    rows = tokens x group of one kv head, against the span on the matrix unit; softmax online in float32

Queries are repeated for each of the F places in a row. A product with keys takes those of one place, the others zeroed;
the product of its weights with values is right in the lanes of that place, and all places are added up in the end.

The grid goes over groups of kv heads, the items within are a loop whose length is known at run time.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jmemserve.kernels import Ragged
from jmemserve.kernels.rule import Rule
from jmemserve.kernels.tpu.work import LANES, Tiling, cut, tiling

Interpret = bool | pltpu.InterpretParams

SPAN = 256  # keys that an item looks at in one go
NEVER = -1e30  # a score that is never seen; finite, so that fully masked partial results stay finite
_VMEM = 10 << 20  # bytes for buffers; 16 MiB are there without asking, on every generation
_SMEM = 512 << 10  # bytes for the tables: half of the scalar memory
_UNROLLED = 8  # kv heads whose products may overlap, where each is small


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static part of a kernel."""

    lead: int  # numbers between a page's and 2 in an address
    rule: Rule
    group: int
    heads: int  # K': kv heads that are worked on together
    align: int  # tokens of a small item
    tile: int  # tokens of any other
    width: int  # pages of a row in the tables
    size: int  # tokens of a page
    per_span: int  # pages
    fold: int  # tokens of a row
    head: int  # H
    sinks: bool

    @property
    def span(self) -> int:
        return self.per_span * self.size


def attend_pages(
    q: jax.Array,
    pages: jax.Array,
    lead: tuple[jax.Array, ...],
    ragged: Ragged,
    rule: Rule,
    sinks: jax.Array | None,
    interpret: Interpret,
) -> jax.Array:
    """q: [T, N, H]; pages: [P, *lead, 2, K, C/F, F * H] -> [T, N, H]; zero for tokens of padding. lead: i32[1] each.

    A kernel has the tables of its rows in scalar memory. All of a step's fit but with many rows of a long context; then
    a kernel for some rows follows the other. Raises ValueError if those of one row do not fit.
    """
    num_tokens, (num_rows, width) = q.shape[0], ragged.tables.shape
    if width * 4 > _SMEM:
        raise ValueError(f"a table of {width} pages is too much for scalar memory: use larger blocks")
    at_once = min(num_rows, _SMEM // (width * 4))
    number = jnp.arange(num_tokens)[:, None, None]
    out = jnp.zeros_like(q)
    for begin in range(0, num_rows, at_once):
        rows = slice(begin, min(begin + at_once, num_rows))
        starts = ragged.starts[rows.start : rows.stop + 1]
        part = dataclasses.replace(ragged, tables=ragged.tables[rows], context=ragged.context[rows], starts=starts)
        sizes = tiling(num_tokens, num_rows, rows.stop - rows.start, q.shape[1] // pages.shape[-3], q.dtype.name)
        is_here = (number >= starts[0]) & (number < starts[-1])  # what no item wrote may be NaN
        out = jnp.where(is_here, _attend_rows(q, pages, lead, part, sizes, rule, sinks, interpret), out)
    return out


def _attend_rows(
    q: jax.Array,
    pages: jax.Array,
    lead: tuple[jax.Array, ...],
    ragged: Ragged,
    sizes: Tiling,
    rule: Rule,
    sinks: jax.Array | None,
    interpret: Interpret,
) -> jax.Array:
    """q: [T, N, H] of all rows; ragged: some rows -> [T, N, H]; tokens of others come back as anything."""
    _, num_heads, head_dim = q.shape
    kv_heads, rows_of_page, lanes = pages.shape[-3:]
    fold = lanes // head_dim
    size = rows_of_page * fold
    width = ragged.tables.shape[1]
    group = num_heads // kv_heads
    work = cut(ragged, sizes)
    per_span = min(max(1, SPAN // size), width)
    rows = sizes.tile * group
    heads = _heads_together(kv_heads, rows, per_span * rows_of_page, lanes, q.dtype.itemsize, pages.dtype.itemsize)
    tile, with_sinks = sizes.tile, sinks is not None
    plan = _Plan(len(lead), rule, group, heads, sizes.align, tile, width, size, per_span, fold, head_dim, with_sinks)

    grouped = jnp.tile(q, fold)[work.token].reshape(sizes.places, kv_heads, group, lanes)
    grouped = grouped.transpose(1, 0, 2, 3).reshape(kv_heads, sizes.places * group, lanes)
    scratch = [
        pltpu.VMEM((2, heads, rows, lanes), q.dtype),  # queries
        pltpu.VMEM((2, per_span, 2, heads, rows_of_page, lanes), pages.dtype),  # keys and values
        pltpu.VMEM((heads, rows, lanes), q.dtype),  # results on their way
        pltpu.VMEM((heads, rows, lanes), jnp.float32),  # sum of weights times values
        pltpu.VMEM((heads, rows, LANES), jnp.float32),  # greatest score
        pltpu.VMEM((heads, rows, LANES), jnp.float32),  # sum of weights
        pltpu.SemaphoreType.DMA((5,)),
    ]
    small = sizes.align * group
    specs = [pl.BlockSpec(memory_space=pl.ANY)] * 2
    operands = [grouped, pages]
    if sinks is not None:  # one period of the rows
        rows_of_sinks = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, group), (1, sizes.align))
        operands.append(jnp.broadcast_to(rows_of_sinks[..., None], (kv_heads, small, LANES)))
        specs.append(pl.BlockSpec((heads, small, LANES), lambda block, *_: (block, 0, 0)))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2 + len(lead),
        grid=(kv_heads // heads,),
        in_specs=specs,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=scratch,
    )
    call = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, q.dtype),
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="paged_attention",
    )
    out = call(work.items, ragged.tables.reshape(-1), *lead, *operands)
    out = out[..., :head_dim].reshape(kv_heads, sizes.places, group, head_dim)[:, work.place].transpose(1, 0, 2, 3)
    return out.reshape(q.shape)


def _heads_together(kv_heads: int, rows: int, span: int, lanes: int, q_bytes: int, kv_bytes: int) -> int:
    """The most kv heads whose buffers fit; half of them at most, so that both cores of a chip that has two work."""
    each = rows * (lanes * (3 * q_bytes + 4) + 2 * LANES * 4) + 4 * span * lanes * kv_bytes
    most = max(1, min(_VMEM // each, kv_heads // 2))
    return max(n for n in range(1, most + 1) if kv_heads % n == 0)


def _kernel(items, tables, *rest, plan: _Plan) -> None:
    """items: see ``work.Work``; tables: i32[B * W]; queries and the result: [K, R * G, H] in HBM."""
    lead = [number[0] for number in rest[: plan.lead]]
    queries, pages, *others = rest[plan.lead :]
    sinks = others.pop(0) if plan.sinks else None
    out, q_buffer, kv_buffer, out_buffer, mixed, top, mass, semaphores = others
    total = items[items.shape[0] - 1]
    first_head = pl.program_id(0) * plan.heads
    heads = pl.ds(first_head, plan.heads)
    window = plan.rule.window

    def bounds(item):
        """(position of the first token, keys from this one on are seen, and before this one)"""
        position = items[4 * item + 2]
        low = 0 if window is None else jnp.maximum(position - window + 1, 0)
        return position, low, position + items[4 * item + 3]

    def spans(item):
        _, low, high = bounds(item)
        return low // plan.span, pl.cdiv(high, plan.span)

    def by_size(item, do) -> None:
        """Small items, all of decode, move and compute little."""
        if plan.align == plan.tile:
            do(plan.tile)
            return
        pl.when(items[4 * item + 3] <= plan.align)(lambda: do(plan.align))
        pl.when(items[4 * item + 3] > plan.align)(lambda: do(plan.tile))

    def places(item, tokens: int):
        period = plan.align * plan.group
        return pl.ds(pl.multiple_of(items[4 * item + 1] * plan.group, period), tokens * plan.group)

    def query_copy(item, tokens: int):
        own = q_buffer.at[item % 2, :, pl.ds(0, tokens * plan.group)]
        return pltpu.make_async_copy(queries.at[heads, places(item, tokens)], own, semaphores.at[2 + item % 2])

    def out_copy(item, tokens: int):
        own = out_buffer.at[:, pl.ds(0, tokens * plan.group)]
        return pltpu.make_async_copy(own, out.at[heads, places(item, tokens)], semaphores.at[4])

    def key_copies(item, span, slot, do) -> None:
        """For every page of a span that has a key which the item sees."""
        _, low, high = bounds(item)
        start = span * plan.per_span
        begin = jnp.maximum(low // plan.size - start, 0)
        end = jnp.minimum(pl.cdiv(high, plan.size) - start, plan.per_span)
        row = items[4 * item] * plan.width + start

        def one(place, carry):
            source = pages.at[(tables[row + place], *lead, slice(None), heads)]
            do(pltpu.make_async_copy(source, kv_buffer.at[slot, place], semaphores.at[slot]))
            return carry

        lax.fori_loop(begin, end, one, None)

    def key_in_row(shape: tuple[int, int]):
        """The number of the key that a lane belongs to, i32[rows of a span, lanes] from its first."""
        key = lax.broadcasted_iota(jnp.int32, shape, 0) * plan.fold
        return key if plan.fold == 1 else key + lax.broadcasted_iota(jnp.int32, shape, 1) // plan.head

    def only(place: int, x):
        """[rows, lanes] with zeros in the lanes of the other places in a row."""
        if plan.fold == 1:
            return x
        lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where((lane >= place * plan.head) & (lane < (place + 1) * plan.head), x, 0)

    def look(item, span, slot, tokens: int) -> None:
        """Every head of an item at one span."""
        rows = tokens * plan.group
        position, low, high = bounds(item)
        # Rows are tokens times group: comparing row with key * group spares a division.
        span_rows = plan.span // plan.fold
        row = lax.broadcasted_iota(jnp.int32, (rows, span_rows), 0)
        first = span * plan.span + lax.broadcasted_iota(jnp.int32, (rows, span_rows), 1) * plan.fold

        def seen_at(place: int):
            key = first + place
            seen = ((key - position) * plan.group <= row) & (key < high)
            return seen if window is None else seen & ((key - position + window) * plan.group > row)

        seen = [seen_at(place) for place in range(plan.fold)]
        key = span * plan.span + key_in_row((span_rows, mixed.shape[2] if plan.fold > 1 else 1))
        is_value = (key >= low) & (key < high)  # anything else may be NaN

        def one_head(head) -> None:
            own = (head, pl.ds(0, rows))
            q = q_buffer[item % 2, head, pl.ds(0, rows)]
            keys, values = (_span_of(kv_buffer[slot, :, half, head]).astype(q.dtype) for half in (0, 1))
            values = jnp.where(is_value, values, 0)
            if plan.fold > 1:  # a key that is seen may be beside one that is not
                keys = jnp.where(is_value, keys, 0)

            def scores_at(place: int):
                scores = _dot(only(place, q), keys, 1) * plan.rule.scale
                if plan.rule.soft_cap is not None:
                    scores = plan.rule.soft_cap * jnp.tanh(scores / plan.rule.soft_cap)
                return jnp.where(seen[place], scores, NEVER)

            scores = [scores_at(place) for place in range(plan.fold)]
            old_top = top[own][:, :1]
            new_top = old_top
            for some in scores:
                new_top = jnp.maximum(new_top, jnp.max(some, 1, keepdims=True))
            keep = jnp.exp(old_top - new_top)
            new_mass = mass[own][:, :1] * keep
            new_mixed = mixed[own] * keep
            for place, some in enumerate(scores):
                weights = jnp.where(seen[place], jnp.exp(some - new_top), 0)
                new_mass += jnp.sum(weights, 1, keepdims=True)
                new_mixed += only(place, _dot(weights.astype(values.dtype), values, 0))
            mixed[own] = new_mixed
            top[own] = jnp.broadcast_to(new_top, (rows, LANES))
            mass[own] = jnp.broadcast_to(new_mass, (rows, LANES))

        together = math.gcd(plan.heads, _UNROLLED) if tokens == plan.align else 1

        def some_heads(part, carry):
            for head in range(together):
                one_head(part * together + head)
            return carry

        lax.fori_loop(0, plan.heads // together, some_heads, None)

    def begin_item(tokens: int) -> None:
        rows = tokens * plan.group
        mixed[:, :rows] = jnp.zeros((plan.heads, rows, mixed.shape[2]), jnp.float32)
        if sinks is None:
            top[:, :rows] = jnp.full((plan.heads, rows, LANES), NEVER)
            mass[:, :rows] = jnp.zeros((plan.heads, rows, LANES), jnp.float32)
            return
        # A sink is a score of which everything is seen already, but a value.
        mass[:, :rows] = jnp.ones((plan.heads, rows, LANES), jnp.float32)
        period = plan.align * plan.group
        for start in range(0, rows, period):
            top[:, start : start + period] = sinks[...]

    def visit(item, count):
        """``count``: spans of all items before, which says where this one's keys are put."""
        begin, end = spans(item)

        @pl.when(item + 1 < total)
        def _():
            by_size(item + 1, lambda tokens: query_copy(item + 1, tokens).start())

        def compute(tokens: int) -> None:
            query_copy(item, tokens).wait()
            begin_item(tokens)

            def one_span(span, carry):
                slot = (count + span - begin) % 2
                is_last = span + 1 == end

                @pl.when(~is_last)
                def _():
                    key_copies(item, span + 1, 1 - slot, lambda copy: copy.start())

                @pl.when(is_last & (item + 1 < total))
                def _():
                    key_copies(item + 1, spans(item + 1)[0], 1 - slot, lambda copy: copy.start())

                key_copies(item, span, slot, lambda copy: copy.wait())
                look(item, span, slot, tokens)
                return carry

            lax.fori_loop(begin, end, one_span, None)

            # What ends a tile and is no token is written where the next item writes later: one at a time.
            @pl.when(item > 0)
            def _():
                by_size(item - 1, lambda tokens: out_copy(item - 1, tokens).wait())

            rows = tokens * plan.group

            def finish(head, carry):
                own = (head, pl.ds(0, rows))
                whole = mixed[own]
                for place in range(1, plan.fold):
                    whole += pltpu.roll(mixed[own], place * plan.head, 1)
                out_buffer[own] = (whole / jnp.maximum(mass[own][:, :1], 1e-30)).astype(out_buffer.dtype)
                return carry

            lax.fori_loop(0, plan.heads, finish, None)
            out_copy(item, tokens).start()

        by_size(item, compute)
        return count + end - begin

    @pl.when(total > 0)
    def _():
        by_size(0, lambda tokens: query_copy(0, tokens).start())
        key_copies(0, spans(0)[0], 0, lambda copy: copy.start())
        lax.fori_loop(0, total, visit, 0)
        by_size(total - 1, lambda tokens: out_copy(total - 1, tokens).wait())


def _span_of(buffer: jax.Array) -> jax.Array:
    """[pages, rows, lanes] -> [pages * rows, lanes]; free, as the rows are a multiple of a register's."""
    return buffer.reshape(-1, buffer.shape[-1])


def _dot(left: jax.Array, right: jax.Array, contracted: int) -> jax.Array:
    """[m, x] with [n, x] (contracted 1) or [x, n] (contracted 0) -> f32[m, n], exact where the operands are float32."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    axes = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(left, right, axes, precision=precision, preferred_element_type=jnp.float32)
