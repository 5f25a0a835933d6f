"""Blocks out of pages and into them by TMA, for GPUs from Hopper on: as in ``kernels/pages.py``, at memory's speed.

XLA's gather and scatter move numbers one by one. Here a thread block brings a part of a block from where it is to
shared memory, and from there to where it belongs. It does no more, so a multiprocessor has several at a time: while
some wait for their bytes, others write theirs.

The kernel sees pages and blocks as [how many, rows, lanes], the same bytes in the same order, with rows as wide as a
copy can be. What it writes to is a Ref, so that it stays where it is.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels.pages import Pages

SIDE = 256  # rows of a copy, and lanes of a row, at most
COPY_BYTES = 32 << 10  # at most; a multiprocessor has shared memory for six copies

Interpret = plgpu.InterpretGPUParams | None
Part = tuple[tuple[jax.Array, int], ...]  # the index along each axis of a page, and how long the axis is


def gather_blocks(pages: Pages, indices: jax.Array, fold: int = 1, *, interpret: Interpret = None) -> jax.Array:
    """See ``pages.gather_blocks``; no pages on GPUs are folded. ``interpret``: on CPU, to see what the kernel does."""
    if not isinstance(pages, tuple):
        return gather_part(pages, indices, fold=fold, interpret=interpret)
    assert fold == 1, f"{fold=}"
    return _gather(pages, (len(indices), len(pages), *pages[0].shape[1:]), indices, (), interpret)


def scatter_blocks(pages: Pages, indices: jax.Array, blocks: jax.Array, *, interpret: Interpret = None) -> Pages:
    """See ``pages.scatter_blocks``."""
    if not isinstance(pages, tuple):
        return scatter_part(pages, indices, blocks, interpret=interpret)
    return _scatter(pages, indices, blocks, (), interpret)


def gather_part(
    pages: jax.Array, indices: jax.Array, *part: jax.Array, fold: int = 1, interpret: Interpret = None
) -> jax.Array:
    """See ``pages.gather_part``; all of a page is a part too."""
    assert fold == 1, f"{fold=}"
    shape = (len(indices), *pages.shape[1 + len(part) :])
    return _gather((pages,), shape, indices, _with_sizes(pages, part), interpret)


def scatter_part(
    pages: jax.Array, indices: jax.Array, blocks: jax.Array, *part: jax.Array, interpret: Interpret = None
) -> jax.Array:
    """See ``pages.scatter_part``; all of a page is a part too."""
    (after,) = _scatter((pages,), indices, blocks, _with_sizes(pages, part), interpret)
    return after


def _gather(
    pages: tuple[jax.Array, ...], shape: tuple[int, ...], indices: jax.Array, part: Part, interpret: Interpret
) -> jax.Array:
    blocks = jax.empty_ref(jax.ShapeDtypeStruct(_seen(shape), pages[0].dtype))
    _move(tuple(own.reshape(_seen(own.shape)) for own in pages), blocks, indices, part, interpret)
    return jax.freeze(blocks).reshape(shape)


def _scatter(
    pages: tuple[jax.Array, ...], indices: jax.Array, blocks: jax.Array, part: Part, interpret: Interpret
) -> tuple[jax.Array, ...]:
    held = tuple(jax.new_ref(own.reshape(_seen(own.shape))) for own in pages)
    _move(held, blocks.reshape(_seen(blocks.shape)), indices, part, interpret)
    return tuple(jax.freeze(own).reshape(pages[0].shape) for own in held)


def _move(
    pages: tuple[jax.Array | jax.Ref, ...],
    blocks: jax.Array | jax.Ref,
    indices: jax.Array,
    part: Part,
    interpret: Interpret,
) -> None:
    """Copy to what is a Ref: a part of each page of one array or several, which are one after the other in blocks.

    All are [.., rows, lanes]. Raises ValueError for rows that TMA cannot copy.
    """
    count, lanes, dtype = blocks.shape[1] // len(pages), blocks.shape[2], blocks.dtype
    width = lanes * dtype.itemsize
    if width % 16:
        raise ValueError(f"it copies rows of multiples of 16 bytes, not {width}")
    rows = next(rows for rows in range(min(SIDE, COPY_BYTES // width), 0, -1) if count % rows == 0)
    leaves = isinstance(blocks, jax.Ref)

    def kernel(pages_refs, blocks_ref, indices_ref, part_refs, held, full):
        block, row = lax.axis_index("block"), lax.axis_index("copy") * rows
        page, number = indices_ref[block], jnp.int32(0)
        for ref, (_, size) in zip(part_refs, part, strict=True):
            number = number * size + ref[0]
        for layer, ref in enumerate(pages_refs):

            @pl.when(lax.axis_index("layer") == layer)
            def _(layer=layer, ref=ref):
                there = ref.at[page, pl.ds(number * count + row, rows)]
                here = blocks_ref.at[block, pl.ds(layer * count + row, rows)]
                plgpu.copy_gmem_to_smem(there if leaves else here, held, full)
                plgpu.barrier_wait(full)
                plgpu.copy_smem_to_gmem(held, here if leaves else there)
                plgpu.wait_smem_to_gmem(0)

    move = plgpu.kernel(
        kernel,
        scratch_types=[plgpu.SMEM((rows, lanes), dtype), plgpu.Barrier()],
        grid=(count // rows, len(pages), len(indices)),
        grid_names=("copy", "layer", "block"),
        num_threads=1,
        thread_name="warpgroup",
        interpret=interpret,
    )
    move(pages, blocks, indices, tuple(index.astype(jnp.int32).reshape(1) for index, _ in part))


def _with_sizes(pages: jax.Array, part: tuple[jax.Array, ...]) -> Part:
    return tuple(zip(part, pages.shape[1:], strict=False))


def _seen(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """[n, ..., K, C, H] as [n, rows, lanes], with whole rows in each [K, C, H]."""
    lanes = math.gcd(SIDE, math.prod(shape[-3:]))
    return shape[0], math.prod(shape[1:]) // lanes, lanes
