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

import re

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels import Ragged
from jmemserve.kernels.choice import Need
from jmemserve.kernels.mosaic_gpu.decode import one_token_rows
from jmemserve.kernels.mosaic_gpu.plan import Pool, wrong_pages
from jmemserve.kernels.mosaic_gpu.prefill import many_token_rows
from jmemserve.kernels.mosaic_gpu.step import attend_by
from jmemserve.kernels.mosaic_gpu.tiles import ROWS, Plan
from jmemserve.kernels.pages import Pages
from jmemserve.kernels.rule import Rule

DEVICES = re.compile(r"\bG?H(100|200|20|800)(-|\b)")  # as JAX names Hoppers: "NVIDIA H100 80GB HBM3"
HEADS = (*range(16, 128, 16), *range(128, 257, 32))  # head dims whose tiles fit swizzles, registers, shared memory
TILE = 128  # query rows, and keys, of one go of a thread block where rows have several tokens
WIDE = 128  # head dims above it have fewer keys in a go, for registers and shared memory
DECODE_SPAN = 64  # keys of one go where rows have one token


def _decode_slots(head_dim: int) -> int:
    """At most 128 kB of keys and values are on their way to each multiprocessor."""
    return max(2, min(4, (128 << 10) // (DECODE_SPAN * head_dim * 4)))


def _tile_span(head_dim: int) -> int:
    """Keys of one go of a tile of queries."""
    return TILE if head_dim <= WIDE else TILE // 2


def why_not(need: Need) -> str | None:
    """What keeps the kernels from serving this, in a few words; None: nothing."""
    if need.platform != "gpu":
        return "it is for GPUs"
    if not DEVICES.search(need.device_kind):
        return f"it is written for Hopper's wgmma, which a {need.device_kind!r} is not known to have"
    if need.head_dim not in HEADS:
        return f"its tiles hold multiples of 16, above 128 of 32, up to 256, not a head dim of {need.head_dim}"
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
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, Pages]:
    """See ``jmemserve.kernels.Attention``. ``interpret``: run the kernels on CPU, to see what they compute."""
    return attend_by(_ones, _many, TILE, q, k, v, pages, layer, ragged, rule, sinks, interpret)


def _ones(pool: Pool, q: jax.Array, kv: jax.Array, tables: jax.Array, context: jax.Array):
    plan = Plan(**vars(pool), span=DECODE_SPAN, slots=_decode_slots(pool.head), warpgroups=1)
    return one_token_rows(plan, q, kv, tables, context)


def _many(pool: Pool, q: jax.Array, kv: jax.Array, tables: jax.Array, ragged: Ragged):
    plan = Plan(**vars(pool), span=_tile_span(pool.head), slots=2, warpgroups=2)
    return many_token_rows(plan, q, kv, tables, ragged, least=2)
