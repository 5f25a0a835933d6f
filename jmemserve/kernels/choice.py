"""Which paged attention an instance uses: the first that its devices and its model allow, and why the others do not."""

import dataclasses
import importlib

from jmemserve.kernels import BACKENDS

# Best first; what is not named here for a platform has to be asked for. cuDNN's paged attention is no candidate: JAX
# takes only pools with exactly as many blocks as the tables have entries, so ours would have to be copied.
PREFERRED = {"cpu": ("cpu", "xla"), "gpu": ("mosaic_gpu", "xla"), "tpu": ("tpu", "xla")}


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


def choose(wanted: str, need: Need) -> Choice:
    """The backend of that name, or with "auto" the best that can serve.

    Raises ValueError, with the reason, if the one that is asked for cannot.
    """
    if wanted != "auto":
        if (reason := why_not(wanted, need)) is not None:
            raise ValueError(f"attention by {wanted!r} is not possible here: {reason}")
        return Choice(wanted)
    refused: list[tuple[str, str]] = []
    for name in PREFERRED.get(need.platform, ("xla",)):
        if (reason := why_not(name, need)) is None:
            return Choice(name, tuple(refused))
        refused.append((name, reason))
    raise AssertionError(f"xla serves everything, but {refused=}")
