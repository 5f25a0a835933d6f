"""Two pools that can send blocks to each other: in one process, or in two.

    Ways().pair("local", Shape(layout, 256, 256))         both here
    Ways().pair("staged-shm", Shape(layout, 256, 256))    the second in a process of its own, ``peer.py``

Each pool has just the one transport that is asked for, so that this is the way which is measured.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import msgpack
import numpy as np
from jax.sharding import Mesh

from jmemserve.errors import TransferError
from jmemserve.kernels.pages import PageLayout
from jmemserve.kvpool import BlockAddress, Medium
from jmemserve.kvpool.pool import MemPool
from jmemserve.kvpool.store import PageStore
from jmemserve.kvpool.transports import PieceSpec, Transport
from jmemserve.kvpool.transports.jax_server import JaxServer, JaxTransport
from jmemserve.kvpool.transports.local import LocalExchange, LocalTransport
from jmemserve.kvpool.transports.staged import staged_shm, staged_tcp

SECRET = b"of the benchmark"
WAYS = ("local", "staged-shm", "staged-tcp", "jax")
TIMEOUT_S = 120.0
START_S = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """How large the pools are, alike on both sides."""

    layout: PageLayout
    hbm_blocks: int
    dram_blocks: int

    @property
    def most_bytes(self) -> int:
        """Of all blocks of one medium."""
        return max(self.hbm_blocks, self.dram_blocks) * self.layout.bytes_per_block


class Far(Protocol):
    """The second pool, as seen from here."""

    def ask(self, order: dict[str, Any]) -> Any:
        """Carry out an order of ``obey``. Raises TransferError with the other side's words."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """The first pool, named "a", linked with the second, named "b"."""

    near: MemPool
    far: Far
    transport: Transport
    processes: int

    def blocks(self, count: int, medium: Medium) -> list[BlockAddress]:
        """Blocks of the first pool with random bytes in them; the caller frees them."""
        layout = self.near.node.store.layout
        blocks = self.near.alloc_mem(count, medium)
        bits = np.random.default_rng(0).integers(0, 100, (1, *layout.page_shape)).astype(layout.dtype)
        for start, stop in self.near.node.store.cuts(count):
            self.near.write(blocks[start:stop], np.repeat(bits, stop - start, 0))
        return blocks


class Ways:
    """Makes pairs. One per process, since there is one exchange and one transfer server in a process."""

    def __init__(self) -> None:
        self._exchange = LocalExchange()
        self._server: JaxServer | None = None

    def transport(self, name: str, store: PageStore, most_bytes: int) -> Transport:
        """One end. Raises TransferError where the system does not have what it needs."""
        device = store.sharding.mesh.devices.flat[0]
        if name == "local":
            return LocalTransport(self._exchange, store.checksums)
        if name == "staged-shm":
            return staged_shm(SECRET, max(32 << 20, 2 * most_bytes))
        if name == "staged-tcp":
            return staged_tcp(SECRET)
        assert name == "jax", f"{name!r} is none of {WAYS}"
        self._server = self._server or JaxServer(device)
        return JaxTransport(self._server, device, store.checksums)

    def pool(self, instance: str, way: str, shape: Shape, device: int) -> MemPool:
        """A pool on one device with one transport, linked with nobody yet."""
        mesh = Mesh(np.array(jax.devices()[device : device + 1]), ("model",))
        return MemPool(
            instance,
            shape.layout,
            shape.hbm_blocks,
            shape.dram_blocks,
            mesh,
            transports=lambda store: (self.transport(way, store, shape.most_bytes),),
            listen=None if way == "local" else "127.0.0.1:0",
            secret=SECRET,
            timeout_s=TIMEOUT_S,
        )

    @contextlib.contextmanager
    def pair(self, way: str, shape: Shape) -> Iterator[Pair]:
        """Two linked pools. Raises TransferError where the way cannot be had."""
        with self.pool("a", way, shape, 0) as near:
            (transport,) = near.node.peers.transports
            if way == "local":
                with self.pool("b", way, shape, len(jax.devices()) - 1) as other:
                    near.link(other)
                    yield Pair(near, Here(other), transport, 1)
                return
            with Process(way, shape) as far:
                near.connect(far.address)
                yield Pair(near, far, transport, 2)


class Here:
    """The second pool in this process."""

    def __init__(self, pool: MemPool):
        self._pool = pool

    def ask(self, order: dict[str, Any]) -> Any:
        return obey(self._pool, order)


class Process:
    """The second pool in a process of its own: one order per line, msgpack in hex, and one answer per line."""

    def __init__(self, way: str, shape: Shape):
        self._way, self._shape = way, shape

    def __enter__(self) -> "Process":
        root = Path(__file__).resolve().parents[2]
        paths = [str(root), str(root / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        said = json.dumps([self._way, dataclasses.asdict(self._shape)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pool_parts.peer", said],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        try:
            self.address = str(self._answer())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # it ends by itself
        try:
            self._process.wait(START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(msgpack.packb(order).hex().encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise TransferError("the other process has ended")
        answer = msgpack.unpackb(bytes.fromhex(line.decode()))
        if "error" in answer:
            raise TransferError(answer["error"])
        return answer["value"]


def obey(pool: MemPool, order: dict[str, Any]) -> Any:
    """Carry out an order at the second pool: {"fetch": [ticket, endpoint, shape, dtype, frames, medium]} -> seconds."""
    ticket, endpoint, shape, dtype, frames, medium = order["fetch"]
    node = pool.node
    (transport,) = node.peers.transports
    spec = PieceSpec(tuple(shape), dtype, frames)
    if medium == Medium.HBM:
        return timed_fetch(transport, endpoint, ticket, spec, node.store.sharding)
    assert node.arena is not None, "a pool without DRAM"
    with node.arena.writable(range(1, spec.num_blocks + 1)) as slots:
        return timed_fetch(transport, endpoint, ticket, spec, slots)


def timed_fetch(
    transport: Transport,
    endpoint: dict[str, Any],
    ticket: dict[str, Any],
    spec: PieceSpec,
    where: jax.sharding.Sharding | Sequence[np.ndarray],
) -> float:
    """Seconds until the bytes are in place."""
    start = time.perf_counter()
    result = transport.fetch(endpoint, ticket, spec, where, TIMEOUT_S)  # type: ignore[arg-type]
    if result is not None:
        result.block_until_ready()
    return time.perf_counter() - start
