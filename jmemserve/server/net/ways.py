"""How the blocks of an instance get to other processes."""

import sys

import jax

from jmemserve.kvpool.store import PageStore
from jmemserve.kvpool.transports import Transport
from jmemserve.kvpool.transports.jax_server import JaxServer, JaxTransport
from jmemserve.kvpool.transports.staged import staged_shm, staged_tcp


def ways_to_others(store: PageStore, secret: bytes, listen: str) -> list[Transport]:
    """Every way that this machine has; the best one that both sides have is taken. ``listen``: "host:port" of links."""
    host = listen.rpartition(":")[0]
    ways: list[Transport] = []
    device = store.sharding.mesh.devices.flat[0]
    if device.platform != "cpu" and isinstance(device, jax.Device):
        ways.append(JaxTransport(JaxServer(device, host), device, store.checksums))
    if sys.platform == "linux":
        ways.append(staged_shm(secret))
    ways.append(staged_tcp(secret, f"{host}:0"))
    return ways
