"""What is known when a kernel is compiled, of any kind of GPU."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels.choice import Need
from jmemserve.kernels.rule import Rule

COLUMNS = 128  # of a head that one product makes; a head with more is a wide one


def wrong_pages(need: Need) -> str | None:
    """What of pages the kernels cannot read, in a few words; None: nothing."""
    if need.dtype not in ("bfloat16", "float16"):
        return f"tensor cores multiply bfloat16 and float16, not {need.dtype}"
    if need.block_size % 16 or (need.block_size & (need.block_size - 1)) or need.block_size > 256:
        return f"it copies blocks of 16, 32, 64, 128 or 256 tokens, not {need.block_size}"
    return None


def next_of(heads: tuple[int, ...], head_dim: int) -> int:
    """The smallest of these head dims that holds a head; itself if none does."""
    return next((held for held in heads if held >= head_dim), head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Where the keys and values of a layer are, and what is asked of them."""

    rule: Rule
    dtype: jnp.dtype
    head: int
    size: int  # tokens of a page
    page_stride: int  # from a page to the next, in units of [C, H]
    value_offset: int  # from keys to values, in the same units
    interpret: plgpu.InterpretGPUParams | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling(Pool):
    """How a thread block goes over them: in spans of keys, through a ring of slots in shared memory."""

    span: int  # keys of a span
    slots: int

    @property
    def rows(self) -> int:
        """Query rows of a tile."""
        raise NotImplementedError

    @property
    def layout(self):
        """How the registers of a warpgroup hold a tile of products: [rows, n] in float32."""
        raise NotImplementedError

    @property
    def parts(self) -> list:
        """The columns of a head, in slices that are computed one after another."""
        return [pl.ds(start, min(COLUMNS, self.head - start)) for start in range(0, self.head, COLUMNS)]

    @property
    def copies(self) -> int:
        """Copies, of keys or of values, that fill a span."""
        return max(1, self.span // self.size)

    def places(self, tables, row, within, chunk):
        """-> (the part of every page, where it begins in units of [C, H]) that make up span ``chunk`` of a row's keys.

        tables: i32[B, W] in global memory; within: of a page, where the layer's keys of the head are.
        """
        if self.size <= self.span:
            part = pl.ds(0, self.size)
            columns = [chunk * self.copies + copy for copy in range(self.copies)]
        else:
            parts = jnp.int32(self.size // self.span)
            part = pl.ds(lax.rem(chunk, parts) * self.span, self.span)
            columns = [lax.div(chunk, parts)]
        # All of the table's entries before the first copy, so that their latencies overlap.
        return part, [tables[row, column] * self.page_stride + within for column in columns]
