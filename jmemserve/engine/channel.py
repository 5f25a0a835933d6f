"""From the leader to its followers: messages with arrays, in order, and the news that somebody is gone.

    leader                                         follower
    FrameServer  <── connect, prove the secret ──  connect
                 <── hello: number, fingerprint ─
                 ── welcome, or why not ────────>
                 ── message, message, ... ──────>  a bounded queue, then ``messages``
                 ── stop ───────────────────────>  closes
    either side sends an empty frame every BEAT_S; who hears nothing for LOST_S, or sees the connection end before
    "stop", calls ``on_lost``

A message is a name, whole numbers, and arrays of numbers: four bytes of length, a msgpack header, the arrays' bytes.
Nothing of it is ever executed. Sending is done by the caller and waits where a follower does not keep up: the sockets'
buffers and the follower's queue are all that is in between.
"""

import contextlib
import dataclasses
import os
import queue
import secrets
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np

from jmemserve.engine.world import World, broadcast
from jmemserve.errors import ConfigError, TransferError
from jmemserve.kvpool.net.frames import Address, FrameServer, FrameSocket, connect

BEAT_S = 5.0
LOST_S = 60.0
MEET_S = 60.0  # for all followers to connect
WAITING = 64  # messages that a follower has taken and not yet carried out
MAX_FRAME = 1 << 30  # bytes; the largest piece of blocks and its header
_SIZE = struct.Struct("<I")
_SECRET = 32  # bytes
_PORT = struct.Struct("<H")
_HELLO, _WELCOME, _TERMINATE, _STOP = "hello", "welcome", "terminate", "stop"


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One thing to do. ``values`` are plain msgpack values."""

    name: str
    values: tuple[Any, ...] = ()
    arrays: tuple[np.ndarray, ...] = ()


def pack(message: Message) -> list[bytes | memoryview]:
    """The parts of a frame; the arrays' bytes are not copied where they lie in one piece."""
    arrays = [np.ascontiguousarray(array) for array in message.arrays]
    about = [(str(array.dtype), array.shape) for array in arrays]
    header = msgpack.packb((message.name, message.values, about))
    return [_SIZE.pack(len(header)) + header, *(array.reshape(-1).view(np.uint8).data for array in arrays)]


def unpack(frame: bytes) -> Message:
    """The message of a frame. Raises TransferError if it is none."""
    try:
        (size,) = _SIZE.unpack_from(frame)
        at = _SIZE.size + size
        name, values, about = msgpack.unpackb(memoryview(frame)[_SIZE.size : at], use_list=False)
        arrays = []
        for dtype, shape in about:
            kind = jnp.dtype(dtype)
            if kind.hasobject:
                raise TransferError(f"arrays of {dtype} do not travel")
            count = int(np.prod(shape, dtype=np.int64))
            arrays.append(np.frombuffer(frame, kind, count, at).reshape(shape))
            at += count * kind.itemsize
        if at != len(frame):
            raise TransferError(f"a message of {at} bytes came in a frame of {len(frame)}")
        return Message(name, values, tuple(arrays))
    except (ValueError, TypeError, struct.error, msgpack.exceptions.UnpackException) as error:
        raise TransferError(f"a frame holds no message: {error}") from error


def end_process(reason: str) -> None:
    """Say why, and end at once: threads that wait for a collective of a dead process never come back."""
    print(f"jmemserve: {reason}; this process ends", file=sys.stderr, flush=True)
    os._exit(1)


def terminate_process() -> None:
    """As if somebody had sent SIGTERM here."""
    os.kill(os.getpid(), signal.SIGTERM)


class Leader:
    """The leader's end. ``send`` and ``stop`` are called from one thread at a time.

    ``on_lost(reason)`` is called from a thread when a follower is gone; ``on_terminate()`` when a follower was asked to
    end, and asks for the whole instance.
    """

    def __init__(
        self,
        world: World,
        fingerprint: str,
        on_lost: Callable[[str], None] = end_process,
        on_terminate: Callable[[], None] = terminate_process,
    ):
        """Wait for all followers. Raises ConfigError if they do not come, or were started otherwise than this one."""
        self._world, self._fingerprint = world, fingerprint
        self._on_lost, self._on_terminate = on_lost, on_terminate
        self._followers: dict[int, FrameSocket] = {}
        self._gone: set[int] = set()
        self._refused = ""
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        everywhere = "::" if ":" in world.host else "0.0.0.0"
        host, secret = world.host if world.on_one_machine else everywhere, secrets.token_bytes(_SECRET)
        self._server = FrameServer(
            host, 0, secret, self._serve, max_connections=world.num_processes, max_frame=MAX_FRAME
        )
        port = Address.parse(self._server.address).port
        broadcast(_PORT.pack(port) + secret, _PORT.size + _SECRET)
        with self._changed:
            wanted = world.num_processes - 1
            self._changed.wait_for(lambda: len(self._followers) == wanted or self._refused, MEET_S)
            here = sorted(self._followers)
        if self._refused or len(here) < wanted:
            self.close()
            raise ConfigError(self._refused or f"of {wanted} other processes only those numbered {here} came")
        threading.Thread(target=_beat, args=(self._followers.values(), self._stopping), daemon=True).start()

    def send(self, message: Message) -> None:
        """Send to every follower; waits where one does not keep up. Raises TransferError if one is gone."""
        parts = pack(message)
        for number, frames in self._followers.items():
            try:
                frames.send(*parts, timeout_s=LOST_S)
            except TransferError as error:
                self._lose(number, error)
                raise

    def stop(self) -> None:
        """Let the followers end, and wait until they have carried out what was sent."""
        self._stopping.set()
        with contextlib.suppress(TransferError):
            self.send(Message(_STOP))
        with self._changed:
            self._changed.wait_for(lambda: len(self._gone) == len(self._followers), MEET_S)
        self.close()

    def close(self) -> None:
        """Break every connection: followers that were not told to stop will say that the leader is lost."""
        self._stopping.set()
        self._server.close()

    def _serve(self, frames: FrameSocket) -> None:
        """The thread of one follower, from its hello to its end."""
        hello = unpack(frames.recv(MEET_S))
        number, theirs = hello.values if hello.name == _HELLO and len(hello.values) == 2 else (0, "")
        problem = self._judge(number, theirs)
        frames.send(*pack(Message(_WELCOME, (problem,))))
        with self._changed:
            if problem:
                self._refused = problem
            else:
                self._followers[number] = frames
            self._changed.notify_all()
        if problem:
            return
        try:
            while True:
                frame = frames.recv(LOST_S)
                if frame and unpack(frame).name == _TERMINATE and not self._stopping.is_set():
                    self._on_terminate()
        except TransferError as error:
            self._lose(number, error)
        finally:
            with self._changed:
                self._gone.add(number)
                self._changed.notify_all()

    def _judge(self, number: Any, theirs: Any) -> str:
        """What is wrong with a follower, or nothing."""
        if not isinstance(number, int) or not 0 < number < self._world.num_processes or number in self._followers:
            return f"a process came as number {number!r} of {self._world.num_processes}"
        if theirs != self._fingerprint:
            return (
                f"process {number} was started otherwise than process 0: there {theirs!r}, here {self._fingerprint!r}; "
                "give all processes the same flags, files and releases"
            )
        return ""

    def _lose(self, number: int, error: Exception) -> None:
        if not self._stopping.is_set():
            self._on_lost(f"process {number} of this instance was lost ({error})")


class Follower:
    """A follower's end. ``messages`` is read by the thread that carries them out."""

    def __init__(self, world: World, fingerprint: str, on_lost: Callable[[str], None] = end_process):
        """Raises ConfigError if the leader refuses, TransferError if it cannot be reached."""
        self._on_lost = on_lost
        self._queue: queue.Queue[Message] = queue.Queue(WAITING)
        self._stopping = threading.Event()
        shared = broadcast(b"", _PORT.size + _SECRET)
        port, secret = _PORT.unpack_from(shared)[0], shared[_PORT.size :]
        self._frames = connect(world.host, port, secret, MEET_S, MAX_FRAME)
        self._frames.send(*pack(Message(_HELLO, (world.process_id, fingerprint))))
        problem = unpack(self._frames.recv(MEET_S)).values[0]
        if problem:
            self.close()
            raise ConfigError(str(problem))
        threading.Thread(target=self._receive, name="from-leader", daemon=True).start()
        threading.Thread(target=_beat, args=([self._frames], self._stopping), daemon=True).start()

    def messages(self) -> Iterator[Message]:
        """What the leader sends, until it says stop."""
        while (message := self._queue.get()).name != _STOP:
            yield message

    def ask_to_terminate(self) -> None:
        """This process was asked to end: it passes that on to the leader, which ends all in order."""
        with contextlib.suppress(TransferError):  # then the leader is lost, which is seen elsewhere
            self._frames.send(*pack(Message(_TERMINATE)))

    def close(self) -> None:
        """End the connection; before ``stop`` came this ends the leader too."""
        self._stopping.set()
        self._frames.close()

    def _receive(self) -> None:
        try:
            while True:
                frame = self._frames.recv(LOST_S)
                if not frame:
                    continue
                message = unpack(frame)
                self._queue.put(message)
                if message.name == _STOP:
                    return
        except TransferError as error:
            if not self._stopping.is_set():
                self._on_lost(f"process 0 of this instance was lost ({error})")


def _beat(connections: Iterable[FrameSocket], stopping: threading.Event) -> None:
    """Say that this process lives."""
    while not stopping.wait(BEAT_S):
        for frames in list(connections):
            with contextlib.suppress(TransferError):  # whoever receives there knows
                frames.send(b"", timeout_s=LOST_S)
