"""Paged attention for TPUs, in Pallas: new keys and values are written, then one grid serves decode, prefill and both.

``write`` puts the new tokens into their pages, ``work`` cuts a batch into items, ``kernel`` computes them. Pages stay
in HBM as they are; what is not in a row's context is neither read nor computed.
"""

import functools

import jax
import jax.numpy as jnp

from jmemserve.kernels import Ragged
from jmemserve.kernels.choice import Need
from jmemserve.kernels.pages import Pages
from jmemserve.kernels.rule import Rule
from jmemserve.kernels.tpu.kernel import Interpret, attend_pages
from jmemserve.kernels.tpu.work import LANES, SUBLANES, TILE, packing
from jmemserve.kernels.tpu.write import write_pages

__all__ = ["TILE", "attend", "fold", "stored_head", "why_not"]


def stored_head(head_dim: int) -> int:
    """See ``kernels.stored_head``: a part of a register's lanes, or as many registers as it takes."""
    if head_dim >= LANES:
        return -(-head_dim // LANES) * LANES
    return 1 << (head_dim - 1).bit_length()


def fold(head_dim: int) -> int:
    """Tokens of a page side by side in a row, see ``pages.py``: as many as fill the lanes of a register.

    XLA lays rows of fewer lanes out with the number of the page innermost, rather than pad each to whole registers;
    every step would copy the pool into the kernels' layout and back.
    """
    return max(1, LANES // head_dim)


def why_not(need: Need) -> str | None:
    """See ``choice.why_not``."""
    if need.platform != "tpu":
        return "it is for TPUs"
    if need.dtype not in ("float32", "bfloat16"):
        return f"it has float32 and bfloat16, not {need.dtype}"
    rows, rest = divmod(need.block_size, fold(stored_head(need.head_dim)))
    if rest or (rows != SUBLANES and rows % packing(need.dtype)):
        return f"a {need.dtype} block of {need.block_size} tokens of head_dim {need.head_dim} does not fill registers"
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
    # What comes after the page's number in an address.
    lead = () if isinstance(pages, tuple) else (jnp.full(1, layer, jnp.int32),)
    out, own = _one_layer(q, k, v, own, lead, ragged, rule, sinks, interpret)
    return out, (*pages[:layer], own, *pages[layer + 1 :]) if isinstance(pages, tuple) else own


@functools.partial(jax.jit, static_argnames=("rule", "interpret"))  # traced once for all layers
def _one_layer(q, k, v, pages, lead, ragged: Ragged, rule: Rule, sinks, interpret: Interpret):
    pages = write_pages(k, v, pages, lead, ragged, interpret)
    return attend_pages(q, pages, lead, ragged, rule, sinks, interpret), pages
