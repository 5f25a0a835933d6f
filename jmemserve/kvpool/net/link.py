"""Messages between instances of different processes: one connection per peer, with names, and news of its end.

who connects                                    who listens
life + hello                          ──────▶   accept(hello) says the name, or why not
                                      ◀──────   no + reason   or   yes + life + hello
accept(hello) says the name, or why not
no + reason   or   yes                ──────▶   the peer is up
the peer is up                        ◀──────   ready
messages; an empty frame whenever there was silence for a while, both ways

A peer of a name that is up already takes the place of the former connection, whose end is reported before anything
of the new one. Only if both sides connect to each other at the same time, both keep the one that the smaller *life* (a
number drawn by each link when it is made) began.
"""

import collections
import contextlib
import secrets
import threading
import time
from collections.abc import Callable

from jmemserve.errors import JmemserveError, TransferError
from jmemserve.kvpool.net.frames import MAX_FRAME, Address, FrameServer, FrameSocket, connect

SILENCE_S = 10.0
MAX_QUEUE = 8192  # messages that wait for one peer
MAX_QUEUE_BYTES = 64 << 20
_CROSSING_S = 2.0  # connections in both directions within so long were begun without knowing of each other
_LIFE = 16
_NO, _YES, _READY = b"n", b"y", b"r"
_MAX_REASON = 1000  # bytes
_END_S = 5.0  # for the last callback of a connection that was replaced


class _Connection:
    """An established connection with a peer: its queue, and the two threads that serve it."""

    def __init__(self, frames: FrameSocket, peer: str, began: bytes, other_life: bytes, silence_s: float):
        self.frames = frames
        self.peer = peer
        self.began = began  # the life of the side that connected
        self.other_life = other_life
        self.since = time.monotonic()
        self.reader: threading.Thread | None = None  # calls the callbacks
        self.ended = threading.Event()  # after its last callback
        self.writer = threading.Thread(target=self._write, name=f"link-to-{peer}", daemon=True)
        self._silence_s = silence_s
        self._queue: collections.deque[bytes] = collections.deque()
        self._queued_bytes = 0
        self._stopped = False
        self._changed = threading.Condition()

    def put(self, payload: bytes) -> None:
        """Queue a message. If there is no room the connection ends. Raises TransferError, also when it ended before."""
        with self._changed:
            if self._stopped:
                raise TransferError(f"the link to {self.peer} has ended")
            if len(self._queue) < MAX_QUEUE and self._queued_bytes + len(payload) <= MAX_QUEUE_BYTES:
                self._queue.append(payload)
                self._queued_bytes += len(payload)
                self._changed.notify()
                return
            waiting = f"{len(self._queue)} messages of {self._queued_bytes} bytes"
        self.stop()
        raise TransferError(f"{self.peer} does not take its messages, {waiting} wait; the link was ended")

    def stop(self) -> None:
        """End the connection: the reader notices, and reports it. Blocks for nothing but a system call."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self.frames.end()

    def _write(self) -> None:
        try:
            while True:
                with self._changed:
                    if not self._queue and not self._stopped:
                        self._changed.wait(self._silence_s / 4)
                    if self._stopped:
                        return
                    payload = self._queue.popleft() if self._queue else b""
                    self._queued_bytes -= len(payload)
                self.frames.send(payload, timeout_s=self._silence_s)
        except TransferError:
            self.stop()


class SocketLink:
    """Messages to and from peers by name. Callbacks come from threads of the link, those of one peer one at a time."""

    def __init__(
        self,
        hello: bytes,
        secret: bytes,
        *,
        listen: str = "127.0.0.1:0",
        accept: Callable[[bytes], str],
        on_message: Callable[[str, bytes], None],
        on_down: Callable[[str], None],
        silence_s: float = SILENCE_S,
    ):
        """``accept`` gives the name of the peer that said this hello, or raises JmemserveError, and the peer is told.

        ``on_down`` is called once for every connection that was up and is lost, after its last ``on_message``; not for
        those that ``close`` ends. A peer that says nothing for ``silence_s`` is lost. Raises TransferError if the
        address to listen at cannot be used.
        """
        self._hello, self._secret, self._silence_s = hello, secret, silence_s
        self._accept, self._on_message, self._on_down = accept, on_message, on_down
        self._life = secrets.token_bytes(_LIFE)
        self._peers: dict[str, _Connection] = {}
        self._lock = threading.Lock()
        self._replacing = threading.Lock()  # one peer comes up at a time
        self._closed = False
        host, port = Address.parse(listen)
        self._server = FrameServer(host, port, secret, self._serve)
        self.address = self._server.address

    def connect(self, address: str, timeout_s: float = 10.0) -> str:
        """Link up with the peer that listens there; its name. Raises TransferError, with the reason if it refuses."""
        deadline = time.monotonic() + timeout_s
        host, port = Address.parse(address)
        frames = connect(host, port, self._secret, timeout_s)
        try:
            frames.send(self._life, self._hello)
            life, hello = _split(_said_yes(frames.recv(deadline - time.monotonic())))
            try:
                peer = self._accept(hello)
            except JmemserveError as error:
                frames.send(_NO, _reason(error))
                raise TransferError(f"refused {address}: {error}") from error
            frames.send(_YES)
            if frames.recv(deadline - time.monotonic()) != _READY:
                raise TransferError(f"{address} was not ready")
            connection = _Connection(frames, peer, self._life, life, self._silence_s)
            if not self._take_place(connection):
                frames.close()
                return peer  # by the connection that it began at the same time
        except BaseException:
            frames.close()
            raise
        threading.Thread(target=self._run, args=(connection,), name=f"link-from-{peer}", daemon=True).start()
        return peer

    def send(self, peer: str, payload: bytes) -> None:
        """Queue a message; never blocks. Raises TransferError: no such peer, too large, or it takes no messages."""
        if not payload or len(payload) > MAX_FRAME:
            raise TransferError(f"a message has from 1 to {MAX_FRAME} bytes, not {len(payload)}")
        with self._lock:
            connection = self._peers.get(peer)
        if connection is None:
            raise TransferError(f"there is no link to {peer!r}")
        connection.put(payload)

    def peers(self) -> list[str]:
        """The names of those that are up."""
        with self._lock:
            return sorted(self._peers)

    def close(self) -> None:
        """End all links and their threads, but the one that calls. Twice is fine."""
        with self._lock:
            self._closed = True
            connections = list(self._peers.values())
        for connection in connections:
            connection.stop()
        self._server.close()
        for connection in connections:
            if connection.reader is not threading.current_thread():
                connection.ended.wait()

    def _serve(self, frames: FrameSocket) -> None:
        """Of whoever connects here, from its hello to its end."""
        deadline = time.monotonic() + self._silence_s
        life, hello = _split(frames.recv(self._silence_s))
        try:
            peer = self._accept(hello)
        except JmemserveError as error:
            frames.send(_NO, _reason(error))
            return
        frames.send(_YES, self._life, self._hello)
        _said_yes(frames.recv(deadline - time.monotonic()))
        connection = _Connection(frames, peer, life, life, self._silence_s)
        if not self._take_place(connection):
            frames.send(_READY)  # the other side comes to the same end
            return
        with contextlib.suppress(TransferError):  # it is lost already: the reader will say so
            frames.send(_READY)
        self._run(connection)

    def _take_place(self, new: _Connection) -> bool:
        """Make it the connection of its peer, after the end of a former one; False if a former one stays."""
        with self._replacing:
            with self._lock:
                old = self._peers.get(new.peer)
                if old is not None and self._crossed(old, new) and old.began < new.began:
                    return False
                if old is not None:
                    del self._peers[new.peer]
            if old is not None:
                old.stop()
                old.ended.wait(_END_S)
            with self._lock:
                if self._closed:
                    raise TransferError("this link is closed")
                self._peers[new.peer] = new
            return True

    def _crossed(self, old: _Connection, new: _Connection) -> bool:
        """Whether both sides of one pair of lives began a connection at the same time."""
        same = old.other_life == new.other_life and old.began != new.began
        return same and new.since - old.since < _CROSSING_S

    def _run(self, connection: _Connection) -> None:
        """Of a connection that is up, until its end."""
        connection.reader = threading.current_thread()
        connection.writer.start()
        try:
            while True:
                payload = connection.frames.recv(self._silence_s)
                if payload:
                    self._on_message(connection.peer, payload)
        except TransferError:
            pass  # this is how a connection ends
        finally:
            self._end(connection)

    def _end(self, connection: _Connection) -> None:
        connection.stop()
        connection.writer.join()
        connection.frames.close()
        with self._lock:
            if self._peers.get(connection.peer) is connection:
                del self._peers[connection.peer]
            tell = not self._closed
        try:
            if tell:
                self._on_down(connection.peer)
        finally:
            connection.ended.set()


def _split(said: bytes) -> tuple[bytes, bytes]:
    """The life and the hello."""
    if len(said) < _LIFE:
        raise TransferError("the peer said no hello")
    return said[:_LIFE], said[_LIFE:]


def _said_yes(answer: bytes) -> bytes:
    """What came with the yes. Raises TransferError with the reason of a no."""
    if answer[:1] == _NO:
        raise TransferError(f"the peer refused: {answer[1:].decode(errors='replace')}")
    if answer[:1] != _YES:
        raise TransferError("the peer said neither yes nor no")
    return answer[1:]


def _reason(error: JmemserveError) -> bytes:
    return str(error).encode()[:_MAX_REASON]
