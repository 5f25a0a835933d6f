"""Paged attention with products by mma, in Pallas' Mosaic GPU: for Ampere and Ada, whose pages come by cp.async, and
in ``mosaic_mma`` for later ones.

    decode.py    rows with one new token: splits of a row's keys in parallel, tiles of 16 query rows
    prefill.py   rows with several: tiles of 64 stacked query rows
    tiles.py     what both do with a span of keys and values
    machine.py   copies and products, and what stands for them in JAX's interpreter

The rest is that of the Hopper kernels: see ``mosaic_gpu``. These GPUs can neither copy nor multiply in the background
of a warpgroup without its registers and instructions, so a thread block is one warpgroup that asks for the next span
before it works on this one, and other thread blocks on the same multiprocessor fill the gaps.
"""

import re
from functools import partial

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels import Ragged
from jmemserve.kernels.choice import Need
from jmemserve.kernels.mosaic_ampere.decode import one_token_rows
from jmemserve.kernels.mosaic_ampere.prefill import many_token_rows
from jmemserve.kernels.mosaic_ampere.tiles import Plan
from jmemserve.kernels.mosaic_gpu.plan import Pool, next_of, wrong_pages
from jmemserve.kernels.mosaic_gpu.step import Keys, attend_by
from jmemserve.kernels.pages import Pages
from jmemserve.kernels.rule import Rule

# As JAX names those of compute capability 8.0, 8.6 and 8.9: "NVIDIA A100-SXM4-80GB", "NVIDIA RTX 6000 Ada Generation".
DEVICES = re.compile(r"\b(A(2|10[GM]?|16|30X?|40|100[DX]?|800)|L(2|4|20|40S?)|RTX A\d+|GeForce RTX [34]0\d0)\b|\bAda\b")
HEADS = tuple(range(32, 257, 32))  # head dims whose columns four warps share
WIDE = 128  # head dims above it have half the keys in a go, for shared memory and registers
DECODE_ROWS = 16  # query rows of an mma: the most query heads of a kv head
DECODE_SPAN = 64  # keys: 32 kB of keys and values on their way, and as much in use, of at least 99 kB
TILE = 64  # query rows of a thread block where rows have several tokens, and below keys of one go
PREFILL_SPAN = 32


def stored_head(head_dim: int) -> int:
    """See ``kernels.stored_head``."""
    return next_of(HEADS, head_dim)


def why_not(need: Need) -> str | None:
    """What keeps the kernels from serving this, in a few words; None: nothing."""
    if need.platform != "gpu":
        return "it is for GPUs"
    if not DEVICES.search(need.device_kind):
        return f"it is written for GPUs of compute capability 8, which a {need.device_kind!r} is not known to be"
    return too_much(need)


def too_much(need: Need) -> str | None:
    """What of a model the kernels cannot serve on any GPU, in a few words; None: nothing."""
    if need.head_dim > HEADS[-1]:
        return f"its tiles hold heads of up to {HEADS[-1]}, not of {need.head_dim}"
    if need.group > DECODE_ROWS:
        return f"its tile has {DECODE_ROWS} query rows for a kv head, not {need.group}"
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
    barriers = interpret is not None  # the interpreter knows no copies without
    return attend_by_mma(q, k, v, pages, layer, ragged, rule, sinks, interpret, barriers=barriers)


def attend_by_mma(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: Pages,
    layer: int,
    ragged: Ragged,
    rule: Rule,
    sinks: jax.Array | None,
    interpret: plgpu.InterpretGPUParams | None,
    *,
    barriers: bool,
) -> tuple[jax.Array, Pages]:
    """The same on any of these GPUs; ``barriers``: whether copies tell barriers, see ``machine.py``."""
    longest = max(DECODE_SPAN, PREFILL_SPAN)
    ones, many = partial(_ones, barriers), partial(_many, barriers)
    return attend_by(ones, many, longest, q, k, v, pages, layer, ragged, rule, sinks, interpret)


def _keys(span: int, pool: Pool) -> int:
    """Of one go."""
    return span if pool.head <= WIDE else span // 2


def _ones(barriers: bool, pool: Pool, q: jax.Array, keys: Keys, context: jax.Array):
    plan = Plan(**vars(pool), span=_keys(DECODE_SPAN, pool), slots=2, query_rows=DECODE_ROWS, barriers=barriers)
    return one_token_rows(plan, q, keys, context)


def _many(barriers: bool, pool: Pool, q: jax.Array, keys: Keys, ragged: Ragged):
    plan = Plan(**vars(pool), span=_keys(PREFILL_SPAN, pool), slots=2, query_rows=TILE, barriers=barriers)
    return many_token_rows(plan, q, keys, ragged)
