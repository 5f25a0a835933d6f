"""Which paged attention an instance uses: the first that its devices and its model allow, and why the others do not."""

import dataclasses
import importlib
from collections.abc import Callable

from jmemserve.kernels import BACKENDS

# Best first; what is not named here for a platform has to be asked for. cuDNN's paged attention is no candidate: JAX
# takes only pools with exactly as many blocks as the tables have entries, so ours would have to be copied.
PREFERRED = {
    "cpu": ("cpu", "xla"),
    "gpu": ("mosaic_gpu", "mosaic_ampere", "mosaic_mma", "xla"),
    "tpu": ("tpu", "xla"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """What attention must serve on one device: JAX's names for the device, and the sizes of its part of the model."""

    platform: str  # cpu, gpu, tpu
    device_kind: str  # for example "NVIDIA H200", "TPU v5 lite"
    dtype: str  # of activations and of pages
    num_kv_heads: int
    group: int  # query heads per kv head
    head_dim: int
    block_size: int
    num_layers: int
    aggregated: bool = True  # how pages lie in memory, see ``pages.py``
    window: bool = False  # some layer has one
    soft_cap: bool = False
    sinks: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """The backend, and for each better one why it cannot be."""

    name: str
    refused: tuple[tuple[str, str], ...] = ()


def why_not(name: str, need: Need) -> str | None:
    """What keeps a backend from serving this, in a few words; None: nothing."""
    reason: str | None = importlib.import_module(BACKENDS[name]).why_not(need)
    return reason


def choose(wanted: str, need: Need, fails: Callable[[str], str | None] = lambda name: None) -> Choice:
    """The backend of that name, or with "auto" the best that can serve.

    ``fails`` tries one out on the device that it is for, and says what went wrong, if anything. Raises ValueError, with
    the reason, if the one that is asked for cannot serve, or none can.
    """
    refused: list[tuple[str, str]] = []
    for name in PREFERRED.get(need.platform, ("xla",)) if wanted == "auto" else (wanted,):
        if (reason := why_not(name, need) or fails(name)) is None:
            return Choice(name, tuple(refused))
        refused.append((name, reason))
    reasons = "; ".join(f"by {name!r}: {reason}" for name, reason in refused)
    raise ValueError(f"attention is not possible here {reasons}")
