"""Put the keys and values of new tokens into their pages, in place.

XLA's own scatter would do, if it left the pages as they lie: compiled for a TPU, it wants a token's kv heads side by
side, and all pages are copied into that layout and back in every layer. This kernel aliases its result to its operand,
so there is nothing to copy, and it touches the chunks (the least that a DMA can address: a register's rows) with a new
token in them: each is read, mixed and written back, several at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jmemserve.kernels import Ragged
from jmemserve.kernels.tpu.kernel import Interpret
from jmemserve.kernels.tpu.work import packing

_RING = 4  # chunks that are under way at the same time


def write_pages(
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    lead: tuple[jax.Array, ...],
    ragged: Ragged,
    interpret: Interpret,
) -> jax.Array:
    """k, v: [T, K, H]; pages: [P, *lead, 2, K, C/F, F * H] -> the same array with the new tokens in their slots.

    lead: i32[1] each.
    """
    num_tokens, num_rows, head_dim = k.shape[0], ragged.context.shape[0], k.shape[2]
    kv_heads, rows_of_page, lanes = pages.shape[-3:]
    fold = lanes // head_dim
    rows = min(packing(pages.dtype.name), rows_of_page)
    size, chunk = rows_of_page * fold, rows * fold  # tokens
    most = min(num_tokens, num_tokens // chunk + 2 * num_rows)
    number = jnp.arange(num_tokens, dtype=jnp.int32)
    used = ragged.starts[-1]
    begins = jnp.zeros(num_tokens, bool).at[ragged.starts[:-1]].set(True, mode="drop")
    begins = (begins | (ragged.slots % chunk == 0)) & (number < used)
    first = jnp.nonzero(begins, size=most + 1, fill_value=used)[0].astype(jnp.int32)  # M + 1: first token of each
    slot = ragged.slots[jnp.minimum(first[:-1], num_tokens - 1)]
    within = slot % chunk
    total = jnp.sum(begins, dtype=jnp.int32)
    items = jnp.stack((slot // size, slot % size // chunk, within, within + first[1:] - first[:-1]), 1)
    items = jnp.append(items.reshape(-1), total).astype(jnp.int32)

    token = jnp.clip((first[:-1] - within)[:, None] + jnp.arange(chunk)[None], 0, num_tokens - 1)  # M, chunk
    new = jnp.stack((k, v), 1).astype(pages.dtype)[token]  # M, chunk, 2, K, H
    new = new.transpose(0, 2, 3, 1, 4).reshape(most, 2, kv_heads, rows, lanes)
    shape = (_RING, 2, kv_heads, rows, lanes)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1 + len(lead),
        grid=(1,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[
            pltpu.VMEM(shape, pages.dtype),
            pltpu.VMEM(shape, pages.dtype),
            pltpu.SemaphoreType.DMA((3, _RING)),
        ],
    )
    call = pl.pallas_call(
        functools.partial(_kernel, lead=len(lead), head_dim=head_dim),
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        grid_spec=grid,
        input_output_aliases={2 + len(lead): 0},
        compiler_params=pltpu.CompilerParams(has_side_effects=True),
        interpret=interpret,
        name="write_kv",
    )
    return call(items, *lead, new, pages)


def _kernel(items, *rest, lead: int, head_dim: int) -> None:
    """items: i32[4 * M + 1] in SMEM: page, chunk of it, first and end of the new tokens of each; at last how many.

    ``pages`` is the result, which is the operand.
    """
    within = [number[0] for number in rest[:lead]]
    new, _, pages, fresh, mixed, semaphores = rest[lead:]
    total = items[items.shape[0] - 1]
    rows, lanes = mixed.shape[-2:]

    def address(item):
        start = pl.multiple_of(items[4 * item + 1] * rows, rows)
        return pages.at[(items[4 * item], *within, slice(None), slice(None), pl.ds(start, rows))]

    def reads(item):
        slot = item % _RING
        return (
            pltpu.make_async_copy(new.at[item], fresh.at[slot], semaphores.at[0, slot]),
            pltpu.make_async_copy(address(item), mixed.at[slot], semaphores.at[1, slot]),
        )

    def back(item):
        slot = item % _RING
        return pltpu.make_async_copy(mixed.at[slot], address(item), semaphores.at[2, slot])

    def start(item):
        for copy in reads(item):
            copy.start()

    def visit(item, carry):
        ahead = item + _RING // 2  # half of the ring is being read, the other half written

        @pl.when(ahead < total)
        def _():
            @pl.when(ahead >= _RING)
            def _():
                back(ahead - _RING).wait()

            start(ahead)

        for copy in reads(item):
            copy.wait()
        slot = item % _RING
        token = lax.broadcasted_iota(jnp.int32, mixed.shape[1:], 2)
        if lanes != head_dim:
            token = token * (lanes // head_dim) + lax.broadcasted_iota(jnp.int32, mixed.shape[1:], 3) // head_dim
        is_new = (token >= items[4 * item + 2]) & (token < items[4 * item + 3])
        mixed[slot] = jnp.where(is_new, fresh[slot], mixed[slot])
        back(item).start()
        return carry

    lax.fori_loop(0, jnp.minimum(total, _RING // 2), lambda item, _: start(item), None)
    lax.fori_loop(0, total, visit, None)
    # ``visit`` waited for what its ring needed: the last _RING are still under way.
    lax.fori_loop(jnp.maximum(total - _RING, 0), total, lambda item, _: back(item).wait(), None)
