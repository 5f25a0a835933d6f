"""What the contract of the transports and its second process share: how each is made, and pieces to send."""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmemserve.kvpool.transports.jax_server import JaxServer, JaxTransport
from jmemserve.kvpool.transports.local import LocalExchange, LocalTransport
from jmemserve.kvpool.transports.staged import staged_shm, staged_tcp

L, K, C, H = 2, 4, 4, 8  # layers, kv heads, tokens per block, head dim
SECRET = b"of the tests"
NAMES = ("local", "jax", "staged-shm", "staged-tcp")


def is_there(name: str) -> bool:
    """Whether this transport is built into the package."""
    module = "staged" if name.startswith("staged") else {"jax": "jax_server"}.get(name, name)
    return importlib.util.find_spec(f"jmemserve.kvpool.transports.{module}") is not None


def make_transport(name: str) -> Any:
    """One end; two of them in one process reach each other."""
    if name == "local":
        return LocalTransport(_exchange(), checksums)
    if name == "jax":
        return JaxTransport(_server(), jax.devices()[-1], checksums)
    if name == "staged-shm":
        return staged_shm(SECRET, 1 << 20)
    if name == "staged-tcp":
        return staged_tcp(SECRET)
    raise LookupError(name)


@functools.cache
def _exchange() -> LocalExchange:
    return LocalExchange()


@functools.cache
def _server() -> JaxServer:
    return JaxServer(jax.devices()[0])


def checksums(blocks: jax.Array | np.ndarray) -> np.ndarray:
    """[n, ...] -> uint32[n]: the bytes of each block, weighted by their place."""
    raw = np.ascontiguousarray(np.asarray(blocks)).reshape(blocks.shape[0], -1).view(np.uint8).astype(np.uint32)
    weights = np.arange(raw.shape[1], dtype=np.uint32) * np.uint32(2654435761) | np.uint32(1)
    return (raw * weights).sum(axis=1, dtype=np.uint32)


def make_piece(n: int, dtype: str, seed: int) -> np.ndarray:
    """[n, L, 2, K, C, H]: each value is 32 * head + something random, exact in every dtype used here."""
    random = np.random.default_rng(seed).integers(0, 32, (n, L, 2, K, C, H))
    heads = np.arange(K).reshape(1, 1, 1, K, 1, 1)
    return (random + 32 * heads).astype(jnp.dtype(dtype))


def sharding(tp: int, start: int = 0) -> NamedSharding:
    """Heads over ``tp`` devices, from that one on."""
    mesh = Mesh(np.array(jax.devices()[start : start + tp]), ("model",))
    return NamedSharding(mesh, P(None, None, None, "model", None, None))
