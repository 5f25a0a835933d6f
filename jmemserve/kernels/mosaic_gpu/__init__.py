"""Paged attention for Hopper GPUs, in Pallas' Mosaic GPU: pages come by TMA, products by wgmma, softmax in float32.

    decode.py    rows with one new token: splits of a row's keys in parallel
    prefill.py   rows with several: tiles of stacked queries
    tiles.py     what both do with a span of keys and values

New keys and values are written before, by XLA's scatter, in place in donated pages: they are some kB per row and layer,
and every thread block of the kernels may then read any page without waiting for another. Sinks are applied after, from
the log of the sum of exponentials that the kernels hand out; window and soft cap are inside.

Other GPUs are refused: wgmma exists on Hopper only. Blackwell replaced it, and on Ampere neither JAX's interpreter of
these kernels nor its TMA-free copies can be checked without the hardware.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels import Ragged
from jmemserve.kernels.choice import Need
from jmemserve.kernels.mosaic_gpu.decode import one_token_rows
from jmemserve.kernels.mosaic_gpu.prefill import many_token_rows
from jmemserve.kernels.mosaic_gpu.tiles import ROWS, Plan
from jmemserve.kernels.pages import Pages, page_sizes, write_kv
from jmemserve.kernels.rule import Rule

HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # as JAX names them: "NVIDIA H100 80GB HBM3"
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
    if not any(word in HOPPER for word in need.device_kind.split()):
        return f"it is written for Hopper's wgmma, which a {need.device_kind!r} does not have"
    if need.dtype not in ("bfloat16", "float16"):
        return f"tensor cores multiply bfloat16 and float16, not {need.dtype}"
    if need.head_dim not in HEADS:
        return f"its tiles hold multiples of 16, above 128 of 32, up to 256, not a head dim of {need.head_dim}"
    if need.block_size % 16 or (need.block_size & (need.block_size - 1)) or need.block_size > 256:
        return f"it copies blocks of 16, 32, 64, 128 or 256 tokens, not {need.block_size}"
    if need.group > ROWS:
        return f"its tile has {ROWS} query rows for a kv head, not {need.group}"
    return None


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
    pages = write_kv(pages, layer, ragged.slots, k, v)
    num_tokens, num_heads, head_dim = q.shape
    num_rows = ragged.context.shape[0]
    kv_heads, size = page_sizes(pages)
    own = pages[layer] if isinstance(pages, tuple) else pages
    per_page = math.prod(own.shape[1:-2])
    plan = partial(
        Plan,
        rule=rule,
        dtype=jnp.dtype(own.dtype),
        head=head_dim,
        size=size,
        page_stride=per_page,
        layer_offset=0 if isinstance(pages, tuple) else layer * 2 * kv_heads,
        value_offset=kv_heads,
        interpret=interpret,
    )
    kv = own.reshape(-1, size, head_dim)  # no copy: all but the last two axes are one
    tables = jnp.pad(ragged.tables, ((0, 0), (0, -ragged.tables.shape[1] % max(1, TILE // size))))
    grouped = q.astype(own.dtype).reshape(num_tokens, kv_heads, num_heads // kv_heads, head_dim)
    ones = partial(one_token_rows, plan(span=DECODE_SPAN, slots=_decode_slots(head_dim), warpgroups=1))
    if num_tokens == num_rows:  # the shape of a step in which every row has one token
        out, lse = ones(grouped, kv, tables, ragged.context)
        return _finished(out, lse, sinks, q), pages
    lengths = ragged.starts[1:] - ragged.starts[:-1]
    single = lengths == 1
    first = jnp.minimum(ragged.starts[:-1], num_tokens - 1)
    one_out, one_lse = ones(grouped[first], kv, tables, jnp.where(single, ragged.context, 0))
    tiled = plan(span=_tile_span(head_dim), slots=2, warpgroups=2)
    out, lse = many_token_rows(tiled, grouped, kv, tables, ragged, least=2)
    target = jnp.where(single, first, num_tokens)
    out = out.at[target].set(one_out.astype(out.dtype), mode="drop")
    lse = lse.at[target].set(one_lse, mode="drop")
    return _finished(out, lse, sinks, q), pages


def _finished(out: jax.Array, lse: jax.Array, sinks: jax.Array | None, q: jax.Array) -> jax.Array:
    """[T, K, G, H] and f32[T, K, G] -> like q; a sink is one more exponential in the sum, without a value."""
    if sinks is not None:
        share = jax.nn.sigmoid(lse * math.log(2) - sinks.reshape(1, *lse.shape[1:]))
        out = out.astype(jnp.float32) * share[..., None]
    return out.reshape(q.shape).astype(q.dtype)
