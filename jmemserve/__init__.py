"""jmemserve: MemServe in JAX, an LLM serving stack with one elastic memory pool per instance."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jmemserve.client import AsyncClient, Client
    from jmemserve.llm import LLM
    from jmemserve.types import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncClient", "Client", "SamplingParams"]

# Imported when first used: a client needs no JAX, and nobody pays for gRPC to read the version.
_HOMES = {
    "LLM": "jmemserve.llm",
    "AsyncClient": "jmemserve.client",
    "Client": "jmemserve.client",
    "SamplingParams": "jmemserve.types",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
