"""Blocks out of pages and into them, by the C++ library: as in ``kernels/pages.py``, at the speed of memory.

XLA's gather fills new memory in small pages, a fault for each; its scatter reads first what it overwrites, and both
leave much of the copying to one thread.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jmemserve.kernels.cpu.library import load
from jmemserve.kernels.pages import Pages


def gather_blocks(pages: Pages, indices: jax.Array, fold: int = 1) -> jax.Array:
    """See ``pages.gather_blocks``. An index outside of the pages is an error."""
    if not isinstance(pages, tuple):
        return _gather(pages, indices, (), _unfolded(pages.shape[1:], fold))
    inner = _unfolded(pages[0].shape[1:], fold)
    blocks = None
    for layer, own in enumerate(pages):
        blocks = _gather(own, indices, (), (len(pages), *inner), blocks, (layer, len(pages)))
    assert blocks is not None, "a model has layers"
    return blocks


def scatter_blocks(pages: Pages, indices: jax.Array, blocks: jax.Array) -> Pages:
    """See ``pages.scatter_blocks``."""
    if not isinstance(pages, tuple):
        return _scatter(pages, indices, (), blocks)
    return tuple(_scatter(own, indices, (), blocks, (layer, len(pages))) for layer, own in enumerate(pages))


def gather_part(pages: jax.Array, indices: jax.Array, *part: jax.Array, fold: int = 1) -> jax.Array:
    """See ``pages.gather_part``."""
    return _gather(pages, indices, part, _unfolded(pages.shape[1 + len(part) :], fold))


def scatter_part(pages: jax.Array, indices: jax.Array, blocks: jax.Array, *part: jax.Array) -> jax.Array:
    """See ``pages.scatter_part``."""
    return _scatter(pages, indices, part, blocks)


def _gather(
    pages: jax.Array,
    indices: jax.Array,
    part: tuple[jax.Array, ...],
    inner: tuple[int, ...],
    before: jax.Array | None = None,
    place: tuple[int, int] = (0, 1),
) -> jax.Array:
    """[n, *inner] with the pages' bytes at ``place`` (number, of how many) of each block, the rest as in ``before``."""
    load()
    result = jax.ShapeDtypeStruct((len(indices), *inner), pages.dtype)
    aliases = None if before is None else {3: 0}
    call = jax.ffi.ffi_call("jmemserve_gather", result, input_output_aliases=aliases)
    given = jnp.zeros(0, pages.dtype) if before is None else before
    return call(pages, indices, _numbers(part), given, place=np.int64(place[0]), places=np.int64(place[1]))


def _scatter(
    pages: jax.Array,
    indices: jax.Array,
    part: tuple[jax.Array, ...],
    blocks: jax.Array,
    place: tuple[int, int] = (0, 1),
) -> jax.Array:
    load()
    result = jax.ShapeDtypeStruct(pages.shape, pages.dtype)
    call = jax.ffi.ffi_call("jmemserve_scatter", result, input_output_aliases={0: 0})
    return call(pages, indices, _numbers(part), blocks, place=np.int64(place[0]), places=np.int64(place[1]))


def _numbers(part: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.stack([index.astype(jnp.int32) for index in part]) if part else jnp.zeros(0, jnp.int32)


def _unfolded(shape: tuple[int, ...], fold: int) -> tuple[int, ...]:
    *lead, rows, lanes = shape
    return (*lead, rows * fold, lanes // fold)
