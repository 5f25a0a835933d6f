"""Paged attention for Hopper GPUs, in Pallas' Mosaic GPU: pages come by TMA, products by wgmma, softmax in float32.

    decode.py    rows with one new token: splits of a row's keys in parallel
    prefill.py   rows with several: tiles of stacked queries
    tiles.py     what both do with a span of keys and values

and, for the kernels of other GPUs (``mosaic_ampere``) too,

    step.py      one layer's attention, given the two kernels
    work.py      who does what: splits, tiles of stacked queries
    softmax.py   the softmax that goes over spans
    plan.py      what is known when a kernel is compiled

Apart from attention, ``moves.py`` moves blocks, for Hopper GPUs and later ones.

New keys and values are written before, by XLA's scatter, in place in donated pages: they are some kB per row and layer,
and every thread block of the kernels may then read any page without waiting for another. Sinks are applied after, from
the log of the sum of exponentials that the kernels hand out; window and soft cap are inside.

Other GPUs are refused: wgmma exists on Hopper only; for those before and after see ``mosaic_ampere``.
"""

import dataclasses
import re

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels import Ragged
from jmemserve.kernels.choice import Need
from jmemserve.kernels.mosaic_gpu.decode import one_token_rows
from jmemserve.kernels.mosaic_gpu.plan import Pool, next_of, wrong_pages
from jmemserve.kernels.mosaic_gpu.prefill import many_token_rows
from jmemserve.kernels.mosaic_gpu.step import Keys, attend_by
from jmemserve.kernels.mosaic_gpu.tiles import ROWS, Plan
from jmemserve.kernels.pages import Pages
from jmemserve.kernels.rule import Rule

DEVICES = re.compile(r"\bG?H(100|200|20|800)(-|\b)")  # as JAX names Hoppers: "NVIDIA H100 80GB HBM3"
HEADS = (*range(16, 128, 16), *range(128, 257, 32))  # head dims whose tiles fit swizzles, registers, shared memory
TILE = 128  # query rows of a thread block where rows have several tokens
WIDE = 128  # head dims above it have fewer keys in a go, for registers and shared memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How thread blocks go over keys and values; ``benchmarks/tiles.py`` finds out what suits a GPU."""

    decode_span: int = 64  # keys of one go where rows have one token
    decode_bytes: int = 128 << 10  # of keys and values that are on their way to a multiprocessor, at most
    decode_blocks: int = 132  # that fill the GPU: registers and shared memory allow one per multiprocessor
    prefill_span: int = 128  # keys of one go of a tile of queries
    prefill_slots: int = 2  # such goes that are on their way

    def ones(self, pool: Pool) -> Plan:
        """For rows with one token."""
        slots = max(2, min(4, self.decode_bytes // (self.decode_span * pool.head * 4)))
        return Plan(**vars(pool), span=self.decode_span, slots=slots, warpgroups=1)

    def many(self, pool: Pool) -> Plan:
        """For the others."""
        span = self.prefill_span if pool.head <= WIDE else self.prefill_span // 2
        return Plan(**vars(pool), span=span, slots=self.prefill_slots, warpgroups=2)


def stored_head(head_dim: int) -> int:
    """See ``kernels.stored_head``."""
    return next_of(HEADS, head_dim)


def why_not(need: Need) -> str | None:
    """What keeps the kernels from serving this, in a few words; None: nothing."""
    if need.platform != "gpu":
        return "it is for GPUs"
    if not DEVICES.search(need.device_kind):
        return f"it is written for Hopper's wgmma, which a {need.device_kind!r} is not known to have"
    if need.head_dim > HEADS[-1]:
        return f"its tiles hold heads of up to {HEADS[-1]}, not of {need.head_dim}"
    if need.group > ROWS:
        return f"its tile has {ROWS} query rows for a kv head, not {need.group}"
    return wrong_pages(need)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: Pages,
    layer: int,
    ragged: Ragged,
    rule: Rule,
    sinks: jax.Array | None = None,
    *,
    tiles: Tiles = Tiles(),  # noqa: B008
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, Pages]:
    """See ``jmemserve.kernels.Attention``. ``interpret``: run the kernels on CPU, to see what they compute."""
    longest = max(tiles.decode_span, tiles.prefill_span)

    def ones(pool: Pool, q: jax.Array, keys: Keys, context: jax.Array):
        return one_token_rows(tiles.ones(pool), q, keys, context, blocks=tiles.decode_blocks)

    def many(pool: Pool, q: jax.Array, keys: Keys, ragged: Ragged):
        return many_token_rows(tiles.many(pool), q, keys, ragged)

    return attend_by(ones, many, longest, q, k, v, pages, layer, ragged, rule, sinks, interpret)
