"""Authenticated, bounded frames over TCP.

client                                              server
                                                    "JMS1" + nonce of the server (32 bytes)
"JMS1" + nonce of the client + HMAC(secret, "client" + both nonces)
                                                    HMAC(secret, "server" + both nonces)
frames from either side: magic (4 bytes), length of the payload (8 bytes), payload

Both ends prove that they know the secret, with nonces of this connection and labels for the direction, so that nothing
heard before and nothing sent back is a proof. What follows is neither encrypted nor signed: whoever can change packets
of the network can change frames. Every wait has a deadline, kept by the kernel; a frame that is larger than agreed ends
the connection before memory is taken for it.
"""

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jmemserve.errors import TransferError

MAX_FRAME = 64 << 20  # bytes of one payload
HANDSHAKE_S = 5.0
SEND_S = 30.0  # a peer that takes nothing for so long is dead
MORE = getattr(socket, "MSG_MORE", 0)
_HELLO = b"JMS1"
_NONCE, _PROOF = 32, hashlib.sha256().digest_size
_HEADER = struct.Struct("<4sQ")
_MAGIC = b"JMSF"
_MAX_PARTS = 512  # buffers in one system call; Linux takes 1024
_SMALL = 64 << 10  # bytes; frames up to this are read ahead, several by one system call
_MAX_PENDING = 64  # connections that have proven nothing yet

Buffer = bytes | bytearray | memoryview  # of bytes: its length is their number


class Address(NamedTuple):
    """A host, without the brackets of IPv6, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @staticmethod
    def parse(text: str) -> "Address":
        """Read "host:port" or "[IPv6]:port". Raises TransferError."""
        host, colon, port = text.rpartition(":")
        if not colon or not port.isascii() or not port.isdecimal() or int(port) > 65_535:
            raise TransferError(f"an address is HOST:PORT, not {text!r:.100}")
        return Address(host.removeprefix("[").removesuffix("]"), int(port))


class FrameSocket:
    """One end of a connection. One thread may send while another receives; further ones wait for their turn.

    After any error the connection is broken: every later call fails, here and at the other end. ``close`` may be
    called from any thread and ends the calls of the others.
    """

    def __init__(self, connection: socket.socket, max_frame: int = MAX_FRAME):
        connection.settimeout(None)  # the kernel's own timeouts are used, a system call less per read
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._max_frame = max_frame
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._timeouts = {socket.SO_SNDTIMEO: 0.0, socket.SO_RCVTIMEO: 0.0}  # as the kernel has them
        self._broken = ""  # why
        self._read_ahead = memoryview(b"")  # received, and not yet asked for
        self._ahead = memoryview(bytearray(0))  # memory for that

    def send(self, *parts: Buffer, timeout_s: float = SEND_S, flags: int = 0) -> None:
        """Send one frame, the parts one after another and uncopied. Raises TransferError.

        With ``flags`` MORE it may wait here for the next frame, and travel in one packet with it.
        """
        size = sum(map(len, parts))
        if size > self._max_frame:
            raise TransferError(f"a frame of {size} bytes is larger than the limit of {self._max_frame}")
        with self._sending:
            self.send_raw(_HEADER.pack(_MAGIC, size), *parts, timeout_s=timeout_s, flags=flags)

    def recv(self, timeout_s: float) -> bytes:
        """Receive one frame. Raises TransferError."""
        deadline = time.monotonic() + timeout_s
        with self._receiving:
            self._read_at_least(_HEADER.size, deadline)
            size = self._take_header(None)
            if size <= _SMALL:
                self._read_at_least(size, deadline)
            first, self._read_ahead = bytes(self._read_ahead[:size]), self._read_ahead[size:]
            return first if len(first) == size else first + self.recv_raw(size - len(first), deadline)

    def recv_into(self, timeout_s: float, *buffers: memoryview) -> None:
        """Receive one frame into the buffers, which it must fill exactly. Raises TransferError.

        What the buffers hold after an error is undefined. A large frame is not copied on its way.
        """
        deadline = time.monotonic() + timeout_s
        size = sum(buffer.nbytes for buffer in buffers)
        with self._receiving:
            if size > _SMALL and not self._read_ahead:
                header = memoryview(bytearray(_HEADER.size))
                rest = self._read_some([header, *buffers], deadline)
                while rest and sum(part.nbytes for part in rest) > size:
                    rest = self._read_some(rest, deadline)
                self._read_ahead = header
                self._take_header(size)  # at once, so that nobody waits for bytes that will not come
            else:
                self._read_at_least(_HEADER.size, deadline)
                self._take_header(size)
                if size <= _SMALL:
                    self._read_at_least(size, deadline)
                rest = self._take_ahead(buffers)
            while rest:
                rest = self._read_some(rest, deadline, socket.MSG_WAITALL)

    def _take_header(self, expected: int | None) -> int:
        """The size of the frame that begins with what was read ahead."""
        magic, size = _HEADER.unpack(self._read_ahead[: _HEADER.size])
        self._check(magic, size, expected)
        self._read_ahead = self._read_ahead[_HEADER.size :]
        return size

    def _take_ahead(self, buffers: tuple[memoryview, ...]) -> list[memoryview]:
        """Fill the buffers from what was read ahead; what is left of them."""
        for index, buffer in enumerate(buffers):
            got = min(buffer.nbytes, self._read_ahead.nbytes)
            buffer[:got] = self._read_ahead[:got]
            self._read_ahead = self._read_ahead[got:]
            if got < buffer.nbytes:
                return [buffer[got:], *buffers[index + 1 :]]
        return []

    def _read_at_least(self, size: int, deadline: float) -> None:
        """Read ahead until there are so many bytes; as many as come at once, to save system calls for small frames."""
        have = self._read_ahead.nbytes
        if have >= size:
            return
        if not self._ahead:
            self._ahead = memoryview(bytearray(2 * _SMALL))
        self._ahead[:have] = bytes(self._read_ahead)  # to the front; by way of a copy, since they may overlap
        while have < size:
            rest = self._read_some([self._ahead[have:]], deadline)
            have = self._ahead.nbytes - sum(part.nbytes for part in rest)
        self._read_ahead = self._ahead[:have]

    def _read_some(self, parts: list[memoryview], deadline: float, flags: int = 0) -> list[memoryview]:
        """Fill the parts as far as possible, by at least a byte; what is left of them."""
        got = self._call(socket.SO_RCVTIMEO, deadline, self._socket.recvmsg_into, parts, 0, flags)[0]
        if got == 0:
            raise self._break("the peer closed the connection")
        return _without(parts, got)

    def end(self) -> None:
        """Make every call fail, here and at the other end, without waiting for those under way; ``close`` follows."""
        self._break("the connection was ended")

    def close(self) -> None:
        """End the connection. Twice is fine."""
        self.end()
        with self._sending, self._receiving:  # a number of a closed socket may soon be another's
            self._socket.close()

    # -- bytes without frames: the handshake, and the frames themselves ------------------------------------------------

    def send_raw(self, *parts: Buffer, timeout_s: float = SEND_S, flags: int = 0) -> None:
        """Send bytes as they are. Raises TransferError."""
        deadline = time.monotonic() + timeout_s
        left = sum(map(len, parts))
        rest: Sequence[Buffer] = parts
        while left:
            sent = self._call(socket.SO_SNDTIMEO, deadline, self._socket.sendmsg, rest[:_MAX_PARTS], (), flags)
            left -= sent
            if left:
                rest = _without([memoryview(part) for part in rest], sent)

    def recv_raw(self, size: int, deadline: float) -> bytes:
        """Receive exactly so many bytes. Raises TransferError."""
        parts, left = [], size
        while left:
            part = self._call(socket.SO_RCVTIMEO, deadline, self._socket.recv, left, socket.MSG_WAITALL)
            if not part:
                raise self._break("the peer closed the connection")
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check(self, magic: bytes, size: int, expected: int | None) -> None:
        if magic != _MAGIC:
            raise self._break(f"the peer sent no frame but {magic!r}")
        if size > self._max_frame:
            raise self._break(f"the peer sent a frame of {size} bytes, above the limit of {self._max_frame}")
        if expected is not None and size != expected:
            raise self._break(f"the peer sent a frame of {size} bytes where {expected} were expected")

    def _call[T](self, option: int, deadline: float, call: Callable[..., T], *arguments: Any) -> T:
        """One system call that ends at the deadline. Raises TransferError."""
        while True:
            if self._broken:
                raise TransferError(self._broken)
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise self._break("time ran out")
            try:
                if not 0 <= self._timeouts[option] - left_s <= 0.01:  # it is kept to 10 ms, for fewer system calls
                    self._socket.setsockopt(socket.SOL_SOCKET, option, _timeval(left_s))
                    self._timeouts[option] = left_s
                return call(*arguments)
            except BlockingIOError:  # the kernel's timeout: the deadline has come, or is about to
                continue
            except OSError as error:
                raise self._break(f"the connection failed: {error}") from error

    def _break(self, why: str) -> TransferError:
        """End the connection for both sides; the error to raise."""
        self._broken = self._broken or why
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes up whoever waits in a call
        return TransferError(self._broken)


def _timeval(seconds: float) -> bytes:
    micros = max(int(seconds * 1e6), 1)  # 0 would be no limit
    return struct.pack("@ll", *divmod(micros, 1_000_000))


def _without(parts: Sequence[memoryview], done: int) -> list[memoryview]:
    """The parts without their first ``done`` bytes, and without empty ones."""
    for index, part in enumerate(parts):
        if done < part.nbytes:
            return [part[done:], *(other for other in parts[index + 1 :] if other.nbytes)]
        done -= part.nbytes
    return []


def connect(host: str, port: int, secret: bytes, timeout_s: float, max_frame: int = MAX_FRAME) -> FrameSocket:
    """A connection to a ``FrameServer`` that knows the secret. Raises TransferError."""
    deadline = time.monotonic() + timeout_s
    where = Address(host, port)
    try:
        connection = socket.create_connection((host, port), timeout=max(timeout_s, 1e-3))
    except OSError as error:
        raise TransferError(f"no connection to {where}: {error}") from error
    frames = FrameSocket(connection, max_frame)
    try:
        deadline = min(deadline, time.monotonic() + HANDSHAKE_S)
        if frames.recv_raw(len(_HELLO), deadline) != _HELLO:
            raise TransferError("it speaks otherwise")
        theirs, ours = frames.recv_raw(_NONCE, deadline), secrets.token_bytes(_NONCE)
        frames.send_raw(_HELLO, ours, _proof(secret, b"client", theirs, ours), timeout_s=HANDSHAKE_S)
        proof = frames.recv_raw(_PROOF, deadline)
        if not hmac.compare_digest(proof, _proof(secret, b"server", theirs, ours)):
            raise TransferError("it does not know the secret")
    except TransferError as error:
        frames.close()
        raise TransferError(f"{where} is no server of ours, or has another secret: {error}") from error
    return frames


def _proof(secret: bytes, label: bytes, server: bytes, client: bytes) -> bytes:
    return hmac.digest(secret, label + server + client, "sha256")


class FrameServer:
    """Accepts connections of those who know the secret and calls ``serve`` for each, in a thread of its own.

    The connection is closed when ``serve`` returns or raises TransferError. Whoever has proven nothing is dropped after
    ``HANDSHAKE_S``, or when too many such wait, the oldest first; they never count as connections.
    """

    def __init__(
        self,
        host: str,
        port: int,
        secret: bytes,
        serve: Callable[[FrameSocket], None],
        max_connections: int = 64,
        max_frame: int = MAX_FRAME,
    ):
        """Port 0 is any. Raises TransferError if the address cannot be used."""
        self.rejected = 0  # connections that proved nothing, or came when there were too many
        self._secret, self._serve = secret, serve
        self._max_connections, self._max_frame = max_connections, max_frame
        self._lock = threading.Lock()
        self._pending: list[FrameSocket] = []  # oldest first
        self._serving: set[FrameSocket] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = False
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family, backlog=_MAX_PENDING)
        except OSError as error:
            raise TransferError(f"cannot listen at {Address(host, port)}: {error}") from error
        self._listener.settimeout(0.5)  # where a shutdown does not end an accept
        self.address = str(Address(host, self._listener.getsockname()[1]))
        self._acceptor = threading.Thread(target=self._accept, name=f"accept-{self.address}", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """End every connection and thread, but the one that calls. Twice is fine."""
        with self._lock:
            self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            connections, threads = [*self._pending, *self._serving], list(self._threads)
        for connection in connections:
            connection.close()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                if not self._closed:
                    time.sleep(0.05)  # too many open files: better times may come
                continue
            try:
                frames = FrameSocket(connection, self._max_frame)
            except OSError:  # gone already
                connection.close()
                continue
            thread = threading.Thread(target=self._run, args=(frames,), name=f"serve-{self.address}", daemon=True)
            with self._lock:
                oldest = self._pending.pop(0) if len(self._pending) >= _MAX_PENDING else None
                self._pending.append(frames)
                self._threads.add(thread)
            if oldest is not None:
                oldest.close()
            thread.start()

    def _run(self, frames: FrameSocket) -> None:
        try:
            if self._admit(frames):
                self._serve(frames)
        except TransferError:
            pass  # the connection ended; both sides know by that
        finally:
            frames.close()
            with self._lock:
                self._serving.discard(frames)
                self._threads.discard(threading.current_thread())

    def _admit(self, frames: FrameSocket) -> bool:
        """Whether the client proved that it knows the secret, and there is room for it."""
        try:
            proven = self._handshake(frames)
        except TransferError:
            proven = False
        with self._lock:
            if frames in self._pending:
                self._pending.remove(frames)
            if proven and len(self._serving) < self._max_connections and not self._closed:
                self._serving.add(frames)
                return True
            self.rejected += 1
            return False

    def _handshake(self, frames: FrameSocket) -> bool:
        deadline = time.monotonic() + HANDSHAKE_S
        ours = secrets.token_bytes(_NONCE)
        frames.send_raw(_HELLO, ours, timeout_s=HANDSHAKE_S)
        if frames.recv_raw(len(_HELLO), deadline) != _HELLO:
            return False
        theirs, proof = frames.recv_raw(_NONCE, deadline), frames.recv_raw(_PROOF, deadline)
        if not hmac.compare_digest(proof, _proof(self._secret, b"client", ours, theirs)):
            return False
        frames.send_raw(_proof(self._secret, b"server", ours, theirs), timeout_s=HANDSHAKE_S)
        return True
