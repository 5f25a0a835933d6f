"""Through the memory of the hosts: the bytes of a piece, frame by frame, by socket or by memory that both ends share.

    staged_tcp(secret)   any two hosts      the source keeps the piece where it is; see ``staged_tcp``
    staged_shm(secret)   on one host        the source copies the piece into its segment; see ``staged_shm``

This file knows pieces: it cuts them into frames of bytes on one side, finds or makes the memory for them on the other,
and counts. A *way* moves frames. Checksums are xxh3 of each frame, taken when it is published and compared where it
arrived.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jmemserve.errors import TransferError
from jmemserve.kvpool.transports import Counters, Piece, PieceSpec, Where, spec_of
from jmemserve.kvpool.transports.checks import wait_ready
from jmemserve.kvpool.transports.staged_shm import ShmWay
from jmemserve.kvpool.transports.staged_tcp import TcpWay

Frames = list[np.ndarray]  # of one piece, in order: each uint8 [frame_bytes], contiguous

_ALIGNMENT = 64  # bytes


class Way(Protocol):
    """How frames get from one process to another."""

    def endpoint(self) -> dict[str, Any]: ...

    def reaches(self, endpoint: Mapping[str, Any]) -> bool: ...

    def put(self, key: str, frames: Frames, checksum: bool) -> dict[str, Any]:
        """Keep the frames for ``get``; what a ticket must say. They must not change until ``drop``."""
        ...

    def get(self, endpoint: Mapping[str, Any], ticket: Mapping[str, Any], frames: Frames, deadline: float) -> None:
        """Fill the frames. Raises TransferError and CorruptBlock."""
        ...

    def drop(self, key: str) -> None: ...

    def close(self) -> None: ...


class StagedTransport:
    """A ``Transport`` by one way."""

    def __init__(self, name: str, way: Way, counters: Counters):
        self.name = name
        self.counters = counters
        self._way = way

    def endpoint(self) -> dict[str, Any]:
        return self._way.endpoint()

    def reaches(self, endpoint: Mapping[str, Any]) -> bool:
        return self._way.reaches(endpoint)

    def publish(self, key: str, piece: Piece, frames: int, checksum: bool = True) -> dict[str, Any]:
        with self._counted_failures():
            spec = spec_of(piece, frames)
            cut = _cut(_on_host(piece), spec)
            return spec.ticket() | self._way.put(key, cut, checksum)

    def fetch(
        self, endpoint: Mapping[str, Any], ticket: Mapping[str, Any], spec: PieceSpec, where: Where, timeout_s: float
    ) -> jax.Array | None:
        deadline = time.monotonic() + timeout_s
        with self._counted_failures():
            spec.check_ticket(ticket)
            spec.check_where(where)
            # Memory of its own for every result: a CPU device takes it as it is, as the memory of the array.
            memory = where if isinstance(where, list) else _fresh(spec)
            self._way.get(endpoint, ticket, _cut(memory, spec), deadline)
            result = None
            if not isinstance(where, list):
                result = jax.device_put(memory, where)
                wait_ready([result], deadline)
        self.counters.moved(spec.frames, spec.nbytes)
        return result

    def release(self, key: str) -> None:
        self._way.drop(key)

    def close(self) -> None:
        self._way.close()

    @contextlib.contextmanager
    def _counted_failures(self) -> Iterator[None]:
        try:
            yield
        except TransferError:
            self.counters.failed()
            raise
        except jax.errors.JaxRuntimeError as error:
            self.counters.failed()
            raise TransferError(f"the device refused: {error}") from error


def staged_tcp(secret: bytes, listen: str = "127.0.0.1:0", advertise: str | None = None) -> StagedTransport:
    """By sockets, between those who know the secret. ``advertise`` is the host name that peers use, if another.

    Raises TransferError if the address cannot be listened at.
    """
    counters = Counters()
    return StagedTransport("staged-tcp", TcpWay(secret, listen, advertise, counters), counters)


def staged_shm(secret: bytes, shm_bytes: int = 256 << 20, wait_s: float = 5.0) -> StagedTransport:
    """By a segment of so many bytes, on one host, between those who know the secret.

    A publish that finds no room waits for ``wait_s``. Raises TransferError where the system has no such memory.
    """
    counters = Counters()
    return StagedTransport("staged-shm", ShmWay(secret, shm_bytes, wait_s, counters), counters)


def _on_host(piece: Piece) -> np.ndarray | list[np.ndarray]:
    """The piece in host memory, where it lies if it is there. Waits for the device."""
    return piece if isinstance(piece, list) else np.asarray(piece)


def _cut(memory: np.ndarray | list[np.ndarray], spec: PieceSpec) -> Frames:
    """The memory of a piece as frames. Raises TransferError if it is not contiguous enough for that."""
    if isinstance(memory, np.ndarray):
        if not memory.flags.c_contiguous:
            raise TransferError("a piece in host memory must be contiguous")
        return list(_bytes(memory).reshape(spec.frames, spec.frame_bytes))
    if spec.frames % spec.num_blocks:
        raise TransferError(f"{spec.frames} frames cannot be cut from {spec.num_blocks} blocks that lie apart")
    if not all(block.flags.c_contiguous for block in memory):
        raise TransferError("the blocks of a piece must be contiguous")
    return [frame for block in memory for frame in _bytes(block).reshape(-1, spec.frame_bytes)]


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _fresh(spec: PieceSpec) -> np.ndarray:
    """Memory for a piece that nobody else has, aligned so that a CPU device takes it as it is."""
    memory = np.empty(spec.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + spec.nbytes].view(jnp.dtype(spec.dtype)).reshape(spec.shape)
