"""Paged attention for GPUs from Hopper on, in Pallas' Mosaic GPU: pages come by TMA, products by mma.

It is for Blackwell, which has no wgmma, and whose workstations have nothing of what replaced it in data centres; and
for Hopper should ``mosaic_gpu`` fail there. Only part of the products per second of such a GPU can be had by mma, but
rows with one token wait for memory. The kernels are those of ``mosaic_ampere``.
"""

import re

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels import Ragged
from jmemserve.kernels.choice import Need
from jmemserve.kernels.mosaic_ampere import attend_by_mma, stored_head, too_much
from jmemserve.kernels.pages import Pages
from jmemserve.kernels.rule import Rule

__all__ = ["attend", "stored_head", "why_not"]

# As JAX names those of compute capability 9, 10 and 12.
DEVICES = re.compile(r"\b(G?H(20|[12]00|800)|G?B[123]00|GB10|GeForce RTX 50\d0|Blackwell)\b")


def why_not(need: Need) -> str | None:
    """What keeps the kernels from serving this, in a few words; None: nothing."""
    if need.platform != "gpu":
        return "it is for GPUs"
    if not DEVICES.search(need.device_kind):
        return f"it is written for GPUs from Hopper on, of which a {need.device_kind!r} is not known to be one"
    return too_much(need)


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
    return attend_by_mma(q, k, v, pages, layer, ragged, rule, sinks, interpret, barriers=True)
