"""Paged attention for TPUs, in Pallas: new keys and values are written, then one grid serves decode, prefill and both.

``write`` puts the new tokens into their pages, ``work`` cuts a batch into items, ``kernel`` computes them. Pages stay
in HBM as they are; what is not in a row's context is neither read nor computed.
"""

import jax

from jmemserve.kernels import Ragged
from jmemserve.kernels.choice import Need
from jmemserve.kernels.pages import Pages
from jmemserve.kernels.rule import Rule
from jmemserve.kernels.tpu.kernel import Interpret, attend_pages
from jmemserve.kernels.tpu.work import LANES, TILE, packing
from jmemserve.kernels.tpu.write import write_pages

__all__ = ["TILE", "attend", "why_not"]


def why_not(need: Need) -> str | None:
    """See ``choice.why_not``."""
    if need.platform != "tpu":
        return "it is for TPUs"
    if need.dtype not in ("float32", "bfloat16"):
        return f"it has float32 and bfloat16, not {need.dtype}"
    # Smaller heads would compile, but XLA lays such pages out with their number innermost, rather than pad each row to
    # whole registers: every step would copy the pool into the kernels' layout and back.
    if need.head_dim % LANES:
        return f"head_dim {need.head_dim} is no multiple of {LANES}, the lanes of a register"
    if need.block_size % packing(need.dtype):
        return (
            f"block size {need.block_size} is no multiple of {packing(need.dtype)}, the rows of a {need.dtype} register"
        )
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
    interpret: Interpret = False,
) -> tuple[jax.Array, Pages]:
    """See ``jmemserve.kernels.Attention``. ``interpret``: simulate a TPU that way, on a CPU (for tests).

    Raises ValueError if the table of one row is larger than the scalar memory (131,072 pages).
    """
    own = pages[layer] if isinstance(pages, tuple) else pages
    lead = () if isinstance(pages, tuple) else (layer,)  # what comes after the page's number in an address
    own = write_pages(k, v, own, lead, ragged, interpret)
    out = attend_pages(q, own, lead, ragged, rule, sinks, interpret)
    return out, (*pages[:layer], own, *pages[layer + 1 :]) if isinstance(pages, tuple) else own
