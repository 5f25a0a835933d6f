"""Between instances of one process: nothing leaves the memory of the machine.

From device to device it is one ``device_put``, which also reshards between meshes of unequal size. Between two CPU
devices an array is not copied at all but given a second name; a device_put there has half the rate of a memory copy.
"""

import dataclasses
import itertools
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jmemserve.errors import TransferError
from jmemserve.kvpool.transports import Counters, Piece, PieceSpec, Where, spec_of
from jmemserve.kvpool.transports.checks import Checksums, sums_of, verify, wait_ready

ALIGNMENT = 64  # bytes; an array on the host that is aligned so becomes an array of a CPU device without a copy


@dataclasses.dataclass(frozen=True, slots=True)
class _Published:
    piece: Piece
    ticket: dict[str, Any]


class LocalExchange:
    """Where the instances of one process lay down their pieces; made once per process and given to each transport."""

    def __init__(self) -> None:
        self.id = secrets.token_hex(16)
        self._members = itertools.count()
        self._pieces: dict[int, dict[str, _Published]] = {}
        self._lock = threading.Lock()

    def join(self) -> int:
        """A number for one more member."""
        with self._lock:
            member = next(self._members)
            self._pieces[member] = {}
            return member

    def put(self, member: int, key: str, published: _Published) -> None:
        """Raises TransferError if the key is in use or the member has left."""
        with self._lock:
            pieces = self._pieces.get(member)
            if pieces is None:
                raise TransferError("this transport is closed")
            if key in pieces:
                raise TransferError(f"{key} is published already")
            pieces[key] = published

    def get(self, member: Any, key: Any) -> _Published:
        """What a ticket of that member names. Raises TransferError if there is no such piece."""
        if not isinstance(member, int) or not isinstance(key, str):
            raise TransferError(f"{member!r:.50} and {key!r:.50} name no piece")
        with self._lock:
            published = self._pieces.get(member, {}).get(key)
        if published is None:
            raise TransferError(f"{key} is not published here, or was released")
        return published

    def remove(self, member: int, key: str) -> None:
        """Forget a piece, if it is there."""
        with self._lock:
            self._pieces.get(member, {}).pop(key, None)

    def leave(self, member: int) -> None:
        """Forget the member and all its pieces."""
        with self._lock:
            self._pieces.pop(member, None)


class LocalTransport:
    """A ``Transport`` to every other one with the same exchange."""

    name = "local"

    def __init__(self, exchange: LocalExchange, checksums: Checksums):
        self.counters = Counters()
        self._exchange = exchange
        self._checksums = checksums
        self._member = exchange.join()
        self._closed = False

    def endpoint(self) -> dict[str, Any]:
        return {"exchange": self._exchange.id, "member": self._member}

    def reaches(self, endpoint: Mapping[str, Any]) -> bool:
        return endpoint.get("exchange") == self._exchange.id

    def publish(self, key: str, piece: Piece, frames: int, checksum: bool = True) -> dict[str, Any]:
        try:
            spec = spec_of(piece, frames)
            ticket = spec.ticket() | {"key": key}
            if checksum:
                ticket["sums"] = sums_of(self._checksums, piece)
            self._exchange.put(self._member, key, _Published(piece, ticket))
        except (TransferError, jax.errors.JaxRuntimeError) as error:
            self.counters.failed()
            raise _as_transfer_error(error) from error
        self.counters.moved(spec.frames, spec.nbytes)
        return ticket

    def fetch(
        self, endpoint: Mapping[str, Any], ticket: Mapping[str, Any], spec: PieceSpec, where: Where, timeout_s: float
    ) -> jax.Array | None:
        deadline = time.monotonic() + timeout_s
        try:
            if self._closed:
                raise TransferError("this transport is closed")
            if not self.reaches(endpoint):
                raise TransferError("the piece was published in another process")
            spec.check_ticket(ticket)
            spec.check_where(where)
            published = self._exchange.get(endpoint.get("member"), ticket.get("key"))
            spec.check_ticket(published.ticket)
            piece = published.piece
            if isinstance(piece, jax.Array):
                wait_ready([piece], deadline)
            result = None
            if isinstance(where, list):
                _copy_to_slots(piece, where)
                verify(ticket, self._checksums, where)
            else:
                result = _put(piece, spec, where)
                wait_ready([result], deadline)
                verify(ticket, self._checksums, result)
        except (TransferError, jax.errors.JaxRuntimeError) as error:
            self.counters.failed()
            raise _as_transfer_error(error) from error
        self.counters.moved(spec.frames, spec.nbytes)
        return result

    def release(self, key: str) -> None:
        self._exchange.remove(self._member, key)

    def close(self) -> None:
        self._closed = True
        self._exchange.leave(self._member)


def _as_transfer_error(error: Exception) -> TransferError:
    return error if isinstance(error, TransferError) else TransferError(f"the device refused: {error}")


def _put(piece: Piece, spec: PieceSpec, where: jax.sharding.Sharding) -> jax.Array:
    """The piece as an array of its own there; never a second name of host memory that can change."""
    if not isinstance(piece, jax.Array):
        return jax.device_put(_copied(piece, spec), where)
    if _on_one_cpu(piece.sharding) and _on_one_cpu(where):
        # Both are immutable, and each keeps the memory alive for the other. XLA never writes into memory of numpy,
        # so donating the result somewhere does not harm the source.
        return jax.device_put(np.asarray(piece), where)
    return jax.device_put(piece, where)


def _on_one_cpu(sharding: jax.sharding.Sharding) -> bool:
    devices: list[Any] = list(sharding.device_set)
    return len(devices) == 1 and devices[0].platform == "cpu"


def _copied(blocks: np.ndarray | list[np.ndarray], spec: PieceSpec) -> np.ndarray:
    """A copy that nobody else will write to, aligned so that a CPU device takes it as it is."""
    memory = np.empty(spec.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy = memory[start : start + spec.nbytes].view(blocks[0].dtype).reshape(spec.shape)
    for target, block in zip(copy, blocks, strict=True):
        np.copyto(target, block)
    return copy


def _copy_to_slots(piece: Piece, slots: list[np.ndarray]) -> None:
    """Write every block into its slot; of an array on devices each shard goes straight to its place."""
    if not isinstance(piece, jax.Array):
        for slot, block in zip(slots, piece, strict=True):
            np.copyto(slot, block)
        return
    for shard in piece.addressable_shards:
        if shard.replica_id == 0:
            blocks, *inner = shard.index
            for slot, block in zip(slots[blocks], np.asarray(shard.data), strict=True):
                np.copyto(slot[tuple(inner)], block)
