"""Frames of pieces by socket.

fetcher                                   publisher
request: id + key             ──────▶
                              ◀──────     yes, or no + reason
                              ◀──────     one frame per frame of the piece: checksum (8 bytes), then its bytes
                              ◀──────     yes: it was published until now

The bytes go from where they were published to where they shall be, without a copy in between. The id is of one
publication: a key that is published again does not answer for an old ticket. The last yes makes sure, with checksums
or without, that no byte was sent after a release, when its memory may have become another's.
"""

import dataclasses
import secrets
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from jmemserve.errors import CorruptBlock, TransferError
from jmemserve.kvpool.net.frames import MORE, Address, FrameServer, FrameSocket, connect
from jmemserve.kvpool.transports import Counters

MAX_FRAME = 1 << 30  # bytes of one frame of a piece
PROBE_S = 2.0
IDLE_S = 300.0  # a connection without requests is closed by the publisher
_KEEP = 4  # connections kept per peer for the next fetch
_MAX_KEY = 1000
_ID = 16
_SUM = struct.Struct("<Q")
_YES, _NO = b"y", b"n"


@dataclasses.dataclass(frozen=True, slots=True)
class _Published:
    id: bytes
    frames: list[np.ndarray]
    sums: list[int]
    nbytes: int


class TcpWay:
    """A ``Way`` by sockets: a server of what is published here, and connections to peers for what is fetched."""

    def __init__(self, secret: bytes, listen: str, advertise: str | None, counters: Counters):
        self._secret = secret
        self._counters = counters
        self._published: dict[str, _Published] = {}
        self._idle: dict[str, list[FrameSocket]] = {}
        self._busy: set[FrameSocket] = set()
        self._closed = False
        self._lock = threading.Lock()
        host, port = Address.parse(listen)
        self._server = FrameServer(host, port, secret, self._serve, max_connections=1024, max_frame=MAX_FRAME)
        port = Address.parse(self._server.address).port
        self._address = str(Address(advertise if advertise is not None else host, port))

    def endpoint(self) -> dict[str, Any]:
        return {"address": self._address}

    def reaches(self, endpoint: Mapping[str, Any]) -> bool:
        try:
            address = _address_of(endpoint)
            frames, _ = self._take(address, time.monotonic() + PROBE_S, fresh=True)
        except TransferError:
            return False
        self._give_back(address, frames)
        return True

    def put(self, key: str, frames: list[np.ndarray], checksum: bool) -> dict[str, Any]:
        if len(key.encode()) > _MAX_KEY:
            raise TransferError(f"a key has at most {_MAX_KEY} bytes, not {len(key.encode())}")
        if frames[0].nbytes + _SUM.size > MAX_FRAME:
            raise TransferError(f"a frame of {frames[0].nbytes} bytes is above the limit of {MAX_FRAME}")
        sums = [xxhash.xxh3_64_intdigest(frame) for frame in frames] if checksum else [0] * len(frames)
        published = _Published(secrets.token_bytes(_ID), frames, sums, sum(frame.nbytes for frame in frames))
        with self._lock:
            if self._closed:
                raise TransferError("this transport is closed")
            if key in self._published:
                raise TransferError(f"{key} is published already")
            self._published[key] = published
        return {"key": key, "id": published.id, "sums": checksum}

    def get(
        self, endpoint: Mapping[str, Any], ticket: Mapping[str, Any], frames: list[np.ndarray], deadline: float
    ) -> None:
        address = _address_of(endpoint)
        key, number, has_sums = ticket.get("key"), ticket.get("id"), ticket.get("sums")
        if not isinstance(key, str) or not isinstance(number, bytes) or type(has_sums) is not bool:
            raise TransferError(f"this names no published piece: {key!r:.50}, {number!r:.50}, {has_sums!r:.50}")
        connection = self._ask(address, number + key.encode(), deadline)
        try:
            _receive(connection, frames, has_sums, deadline)
            _check_yes(connection.recv(deadline - time.monotonic()))
        except TransferError:
            self._discard(connection)
            raise
        self._give_back(address, connection)

    def drop(self, key: str) -> None:
        with self._lock:
            self._published.pop(key, None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._published.clear()
            connections = [*self._busy, *(frames for group in self._idle.values() for frames in group)]
            self._idle.clear()
        for frames in connections:
            frames.close()
        self._server.close()

    # -- the publisher -------------------------------------------------------------------------------------------------

    def _serve(self, connection: FrameSocket) -> None:
        """Answer the requests of one connection, until it ends."""
        while True:
            request = connection.recv(IDLE_S)
            key = request[_ID:].decode(errors="replace")
            published = self._published.get(key)
            if published is None or published.id != request[:_ID]:
                connection.send(_NO, f"{key:.100} is not published here, or was released".encode())
                continue
            connection.send(_YES)
            for frame, checksum in zip(published.frames, published.sums, strict=True):
                if self._published.get(key) is not published:
                    return  # the end of the connection says it
                connection.send(_SUM.pack(checksum), memoryview(frame), flags=MORE)
            if self._published.get(key) is not published:
                return
            self._counters.moved(len(published.frames), published.nbytes)
            connection.send(_YES)

    # -- the fetcher ---------------------------------------------------------------------------------------------------

    def _ask(self, address: str, request: bytes, deadline: float) -> FrameSocket:
        """A connection on which the frames are about to come. Raises TransferError, with the reason if it says no."""
        while True:
            connection, used = self._take(address, deadline, fresh=False)
            try:
                connection.send(request, timeout_s=deadline - time.monotonic())
                answer = connection.recv(deadline - time.monotonic())
            except TransferError:
                self._discard(connection)
                if used and time.monotonic() < deadline:
                    continue  # closed since its last use; there is an end to the kept ones
                raise
            try:
                _check_yes(answer)
            except TransferError:
                self._give_back(address, connection)
                raise
            return connection

    def _take(self, address: str, deadline: float, fresh: bool) -> tuple[FrameSocket, bool]:
        """A connection of our own for a while, and whether it was used before."""
        with self._lock:
            if self._closed:
                raise TransferError("this transport is closed")
            idle = self._idle.get(address)
            if idle and not fresh:
                frames = idle.pop()
                self._busy.add(frames)
                return frames, True
        frames = connect(*Address.parse(address), self._secret, deadline - time.monotonic(), MAX_FRAME)
        with self._lock:
            if not self._closed:
                self._busy.add(frames)
                return frames, False
        frames.close()
        raise TransferError("this transport is closed")

    def _give_back(self, address: str, frames: FrameSocket) -> None:
        with self._lock:
            self._busy.discard(frames)
            idle = self._idle.setdefault(address, [])
            if not self._closed and len(idle) < _KEEP:
                idle.append(frames)
                return
        frames.close()

    def _discard(self, frames: FrameSocket) -> None:
        with self._lock:
            self._busy.discard(frames)
        frames.close()


def _address_of(endpoint: Mapping[str, Any]) -> str:
    address = endpoint.get("address")
    if not isinstance(address, str):
        raise TransferError(f"{address!r:.50} is no address")
    return address


def _receive(connection: FrameSocket, frames: list[np.ndarray], has_sums: bool, deadline: float) -> None:
    """Fill the frames from the connection, and compare each with its checksum while it is in the cache."""
    buffer = bytearray(_SUM.size)
    view = memoryview(buffer)
    for index, frame in enumerate(frames):
        connection.recv_into(deadline - time.monotonic(), view, memoryview(frame))
        if has_sums:
            theirs, ours = _SUM.unpack(buffer)[0], xxhash.xxh3_64_intdigest(frame)
            if theirs != ours:
                raise CorruptBlock(f"frame {index} of {len(frames)} left with checksum {theirs:#x}, not {ours:#x}")


def _check_yes(answer: bytes) -> None:
    if answer[:1] != _YES:
        raise TransferError(f"the peer refused: {answer[1:500].decode(errors='replace')}")
