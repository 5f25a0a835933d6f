"""Paged attention, products and moves of blocks for CPUs, in C++ through XLA's foreign functions: see ``native/``.

New keys and values are written and attended to in one call, which leaves the pages where they are. Attention is cut in
ways that depend on a row alone, so its result does not depend on who shares the batch; products add in an order that
depends on how many columns there are. Columns of padding are not computed at all: a step of 64 tokens of which 17 are
used costs what 17 cost.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jmemserve.kernels import Ragged
from jmemserve.kernels.choice import Need
from jmemserve.kernels.cpu.library import Missing, load
from jmemserve.kernels.pages import Pages
from jmemserve.kernels.rule import Rule

TILE = 64  # queries, and keys, that are looked at in one go where a row has several new tokens
_DTYPES = ("float32", "bfloat16")
_MAX_HEAD_DIM = 512


def why_not(need: Need) -> str | None:
    """See ``choice.why_not``."""
    if need.platform != "cpu":
        return "it is for CPUs"
    if need.dtype not in _DTYPES:
        return f"it has {' and '.join(_DTYPES)}, not {need.dtype}"
    if need.head_dim > _MAX_HEAD_DIM:
        return f"head_dim {need.head_dim} is above {_MAX_HEAD_DIM}"
    try:
        load()
    except Missing as error:
        return str(error)
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
    isa: str = "",
) -> tuple[jax.Array, Pages]:
    """See ``jmemserve.kernels.Attention``. ``isa``: not the best set of instructions, but that one (for tests)."""
    load()
    discrete = isinstance(pages, tuple)
    own = pages[layer] if isinstance(pages, tuple) else pages
    results = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(own.shape, own.dtype))
    call = jax.ffi.ffi_call("jmemserve_attend", results, input_output_aliases={3: 1})
    out, own = call(
        q,
        k,
        v,
        own,
        ragged.slots,
        ragged.tables,
        ragged.context,
        ragged.starts,
        jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32),
        layer=np.int64(0 if discrete else layer),
        scale=np.float32(rule.scale),
        window=np.int64(rule.window or 0),
        soft_cap=np.float32(rule.soft_cap or 0),
        isa=isa,
    )
    return out, (*pages[:layer], own, *pages[layer + 1 :]) if isinstance(pages, tuple) else own


def project(weight: jax.Array, x: jax.Array, used: jax.Array | None = None, *, isa: str = "") -> jax.Array:
    """[out, in] x [in, T] -> f32[out, T], summed in float32.

    Of the T columns only the first ``used`` (i32[]) are computed, the others are 0. weight: float32, bfloat16, or int8
    (then without its scales), and what else has 8 bits becomes x's type first; x: float32 or bfloat16.
    """
    load()
    if weight.dtype.itemsize == 1 and weight.dtype != jnp.int8:
        weight = weight.astype(x.dtype)
    call = jax.ffi.ffi_call("jmemserve_product", jax.ShapeDtypeStruct((weight.shape[0], x.shape[1]), jnp.float32))
    count = jnp.zeros(0, jnp.int32) if used is None else used.reshape(1)
    return call(weight, x, count, isa=isa)
