"""Frames of pieces through memory that two processes of one host share.

    segment   [ nonce | page of free space .. | piece | piece | free ... ]          of the publisher, mapped by peers
    piece     [ id 16 | digest of the key 16 | number of frames 8 | 0 | checksums, 8 each | 0.. | frames ]

A segment has no name: peers open it as a file of the publisher's process, so nothing is left when that dies. Only its
publisher writes to it. A fetch compares the id of the piece before and after it copied: a release wipes the id before
the memory is given to another, so that no byte of another piece is taken for one of this.
"""

import dataclasses
import fcntl
import hashlib
import hmac
import mmap
import os
import secrets
import select
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jmemserve.errors import CorruptBlock, TransferError
from jmemserve.kvpool.transports import Counters
from jmemserve.kvpool.transports.shm_space import Space

_LINE = 64  # bytes; frames and pieces begin at such
_PAGE = 4096
_NONCE, _ID = 32, 16
_HEAD = struct.Struct("<16s16sQ")
_HEAD_BYTES = _LINE
_COPY = 256 << 10  # bytes copied before they are checked: they are in the cache then
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class ShmWay:
    """A ``Way`` through a segment of our own, for what is published here, and those of peers."""

    def __init__(self, secret: bytes, num_bytes: int, wait_s: float, counters: Counters):
        self._secret, self._wait_s, self._counters = secret, wait_s, counters
        self._size = max(-(-num_bytes // _PAGE) * _PAGE, 2 * _PAGE)
        try:
            self._boot = _BOOT.read_text().strip()
            self._fd = os.memfd_create("jmemserve", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self._fd, self._size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _seals())
            self._memory = np.frombuffer(mmap.mmap(self._fd, self._size), np.uint8)
        except (OSError, AttributeError) as error:
            raise TransferError(f"this system shares no memory in the way that is needed: {error}") from error
        self._nonce = secrets.token_bytes(_NONCE)
        self._memory[:_NONCE] = np.frombuffer(self._nonce, np.uint8)
        self._space = Space(_PAGE, self._size)
        self._claims: dict[str, _Claim] = {}  # what is published or being so, by key
        self._peers: dict[bytes, _PeerSegment] = {}  # by nonce
        self._closed = False
        self._changed = threading.Condition()

    def endpoint(self) -> dict[str, Any]:
        says = {"boot": self._boot, "pid": os.getpid(), "fd": self._fd, "size": self._size, "nonce": self._nonce}
        return says | {"proof": _proof(self._secret, says)}

    def reaches(self, endpoint: Mapping[str, Any]) -> bool:
        try:
            return self._segment_of(endpoint).is_alive()
        except TransferError:
            return False

    # -- the publisher -------------------------------------------------------------------------------------------------

    def put(self, key: str, frames: list[np.ndarray], checksum: bool) -> dict[str, Any]:
        frame_bytes = frames[0].nbytes
        first = _first_frame(len(frames))
        claim = _Claim()
        start = self._reserve(key, claim, first + len(frames) * frame_bytes)
        piece = self._memory[start : start + first + len(frames) * frame_bytes]
        sums, at = [], first
        for frame in frames:
            sums.append(_copy(piece[at : at + frame_bytes], frame, frame, checksum))
            at += frame_bytes
        piece[_HEAD_BYTES : _HEAD_BYTES + 8 * len(frames)].view("<u8")[:] = sums
        number = secrets.token_bytes(_ID)
        head = _HEAD.pack(number, _digest(key), len(frames))
        with self._changed:
            if self._claims.get(key) is not claim:  # released, or all closed, since
                self._space.free(start)
                self._changed.notify_all()
                raise TransferError(f"{key} was released while it was published")
            piece[: len(head)] = np.frombuffer(head, np.uint8)  # last: whoever sees the id sees all that it stands for
            claim.start = start
        self._counters.moved(len(frames), len(frames) * frame_bytes)
        return {"key": key, "id": number, "at": start, "sums": checksum}

    def drop(self, key: str) -> None:
        with self._changed:
            claim = self._claims.pop(key, None)
            if claim is not None and claim.start is not None:
                self._memory[claim.start : claim.start + _ID] = 0  # before anything else is written there
                self._space.free(claim.start)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            for key in list(self._claims):
                self.drop(key)
            self._memory[:_NONCE] = 0  # peers that have it mapped see that it is nobody's
            peers = list(self._peers.values())
            self._peers.clear()
            self._changed.notify_all()
        os.close(self._fd)
        for peer in peers:
            peer.close()

    def _reserve(self, key: str, claim: "_Claim", size: int) -> int:
        """Room for a piece, waiting for a release if there is none. Raises TransferError."""
        if size > self._space.largest:
            raise TransferError(f"a piece takes {size} bytes of shared memory, but it has only {self._space.largest}")
        deadline = time.monotonic() + self._wait_s
        with self._changed:
            if key in self._claims:
                raise TransferError(f"{key} is published already")
            self._claims[key] = claim
            while not self._closed and self._claims.get(key) is claim:
                start = self._space.take(size)
                if start is not None:
                    return start
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    del self._claims[key]
                    raise TransferError(
                        f"no room for {size} bytes of shared memory in {self._wait_s:g} s: "
                        f"{self._space.free_bytes} of {self._size} are free, in parts"
                    )
            if self._claims.get(key) is claim:
                del self._claims[key]
            raise TransferError("this transport is closed" if self._closed else f"{key} was released")

    # -- the fetcher ---------------------------------------------------------------------------------------------------

    def get(
        self, endpoint: Mapping[str, Any], ticket: Mapping[str, Any], frames: list[np.ndarray], deadline: float
    ) -> None:
        segment = self._segment_of(endpoint)
        key, number, start, has_sums = (ticket.get(name) for name in ("key", "id", "at", "sums"))
        if not isinstance(key, str) or not isinstance(number, bytes) or type(has_sums) is not bool:
            raise TransferError(f"this names no published piece: {key!r:.50}, {number!r:.50}, {has_sums!r:.50}")
        frame_bytes, first = frames[0].nbytes, _first_frame(len(frames))
        size = first + len(frames) * frame_bytes
        if type(start) is not int or start % _LINE or not _PAGE <= start <= segment.memory.nbytes - size:
            raise TransferError(f"{size} bytes at {start!r:.50} do not lie in the segment of the peer")
        piece = segment.memory[start : start + size]
        head = _HEAD.pack(number, _digest(key), len(frames))
        segment.check(piece, head)
        sums = piece[_HEAD_BYTES : _HEAD_BYTES + 8 * len(frames)].view("<u8").tolist() if has_sums else None
        at, wrong = first, ""
        for index, frame in enumerate(frames):
            ours = _copy(frame, piece[at : at + frame_bytes], frame, has_sums)
            at += frame_bytes
            if sums is not None and ours != sums[index]:
                wrong = f"frame {index} of {len(frames)} left with checksum {sums[index]:#x}, not {ours:#x}"
                break
            if time.monotonic() > deadline:
                raise TransferError("time ran out")
        segment.check(piece, head)
        if wrong:
            raise CorruptBlock(wrong)

    def _segment_of(self, endpoint: Mapping[str, Any]) -> "_PeerSegment":
        """The mapped segment behind an endpoint. Raises TransferError."""
        nonce = endpoint.get("nonce")
        names = ("boot", "pid", "fd", "size", "nonce")
        says = {name: endpoint.get(name) for name in names}
        types = [type(value) for value in says.values()]
        proof = endpoint.get("proof")
        if types != [str, int, int, int, bytes] or not isinstance(proof, bytes):
            raise TransferError("this is no endpoint of shared memory")
        if not hmac.compare_digest(proof, _proof(self._secret, says)):
            raise TransferError("the peer does not know the secret")
        if says["boot"] != self._boot:
            raise TransferError("the peer is on another host")
        with self._changed:
            if self._closed:
                raise TransferError("this transport is closed")
            segment = self._peers.get(nonce) if isinstance(nonce, bytes) else None
            if segment is None:
                for known, other in list(self._peers.items()):
                    if not other.is_alive():
                        self._peers.pop(known).close()
                segment = _PeerSegment(says)
                self._peers[segment.nonce] = segment
        return segment


@dataclasses.dataclass(slots=True, eq=False)
class _Claim:
    """The use of a key, from the first moment of its publication to its release."""

    start: int | None = None  # where the piece lies, once it is complete


class _PeerSegment:
    """The segment of a living process, mapped to be read."""

    def __init__(self, says: Mapping[str, Any]):
        """Raises TransferError unless it is the segment that the peer wrote its nonce into."""
        self.nonce: bytes = says["nonce"]
        self._lock = threading.Lock()
        self._pidfd: int | None = None
        fd = -1
        try:
            self._pidfd = os.pidfd_open(says["pid"])  # first: the number may become another's afterwards
            fd = os.open(f"/proc/{says['pid']}/fd/{says['fd']}", os.O_RDONLY | os.O_CLOEXEC)
            # A segment that its owner could shrink would end us with a signal.
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _seals() != _seals() or os.fstat(fd).st_size != says["size"]:
                raise TransferError("the memory of the peer is not what it says")
            self.memory = np.frombuffer(mmap.mmap(fd, says["size"], prot=mmap.PROT_READ), np.uint8)
            if not self.is_alive():
                raise TransferError("the memory of the peer is not the one that it wrote to")
        except (OSError, ValueError, OverflowError) as error:
            self.close()
            raise TransferError(f"the memory of the peer cannot be mapped: {error}") from error
        except TransferError:
            self.close()
            raise
        finally:
            if fd >= 0:
                os.close(fd)

    def is_alive(self) -> bool:
        """Whether its process runs and has not closed it."""
        with self._lock:
            if self._pidfd is None:
                return False
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            return not poll.poll(0) and self.memory[:_NONCE].tobytes() == self.nonce

    def check(self, piece: np.ndarray, head: bytes) -> None:
        """Raise TransferError unless this is what lies there, published by a living process."""
        if not self.is_alive():
            raise TransferError("the peer is gone")
        if piece[: len(head)].tobytes() != head:
            raise TransferError("the piece is not published there, or was released")

    def close(self) -> None:
        """The mapping itself ends with its last user."""
        with self._lock:
            pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            os.close(pidfd)


def _copy(target: np.ndarray, source: np.ndarray, summed: np.ndarray, checked: bool) -> int:
    """Copy a frame; the checksum of ``summed``, which is one of the two, or 0. Each part is read while in the cache."""
    if not checked or target.nbytes <= _COPY:
        np.copyto(target, source)
        return xxhash.xxh3_64_intdigest(summed) if checked else 0
    digest = xxhash.xxh3_64()
    for start in range(0, target.nbytes, _COPY):
        np.copyto(target[start : start + _COPY], source[start : start + _COPY])
        digest.update(summed[start : start + _COPY])
    return digest.intdigest()


def _seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def _first_frame(num_frames: int) -> int:
    """Where the frames of a piece begin, after its head."""
    return -(-(_HEAD_BYTES + 8 * num_frames) // _LINE) * _LINE


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _proof(secret: bytes, says: Mapping[str, Any]) -> bytes:
    text = "|".join(repr(says[name]) for name in ("boot", "pid", "fd", "size", "nonce"))
    return hmac.digest(secret, b"shared memory " + text.encode(), "sha256")
