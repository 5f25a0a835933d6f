"""One gRPC stream of byte messages both ways, the same on either end, and the handshake that begins it.

who dials                          who listens
Knock(nonce)               ──▶
                           ◀──     Challenge(nonce, proof)
Proof(proof)               ──▶     both know that the other knows the secret
messages                  ◀──▶
"""

import asyncio
import collections
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from jmemserve.errors import TransferError
from jmemserve.server.net.secret import NONCE, is_proof, proof
from jmemserve.server.net.words import HANDSHAKE, Challenge, Knock, Proof

SERVICE = "jmemserve.internal.Members"
MAX_MESSAGE = 16 << 20
MAX_QUEUE = 8192  # messages that wait for the other side
MAX_QUEUE_BYTES = 64 << 20
HANDSHAKE_S = 10.0
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.keepalive_time_ms", 10_000),  # a peer whose machine is gone is noticed without traffic
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a link of its own for each stream
)
SERVER_OPTIONS = (
    *OPTIONS,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # another server on the same port is an error, not a partner
)


class Stream:
    """``read`` and ``write`` of a call, on either end. ``put`` and ``end`` are for any thread and never block."""

    def __init__(self, read: Callable[[], Awaitable[Any]], write: Callable[[bytes], Awaitable[Any]]):
        self._read, self._write = read, write
        self._loop = asyncio.get_running_loop()
        self._queue: collections.deque[bytes] = collections.deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()
        self._closing = False
        self.overflow = False

    def put(self, message: bytes) -> None:
        """Queue a message. What does not fit, or comes after the end, is lost, and the stream ends."""
        try:
            self._loop.call_soon_threadsafe(self._put, message)
        except RuntimeError:  # the loop has ended, and the stream with it
            pass

    def _put(self, message: bytes) -> None:
        if self._closing:
            return
        if len(self._queue) >= MAX_QUEUE or self._queued_bytes + len(message) > MAX_QUEUE_BYTES:
            self.overflow = True
            self._closing = True
            self._queue.clear()
        else:
            self._queue.append(message)
            self._queued_bytes += len(message)
        self._wake.set()

    def end(self) -> None:
        """Write what is queued, then end; from any thread."""

        def close() -> None:
            self._closing = True
            self._wake.set()

        try:
            self._loop.call_soon_threadsafe(close)
        except RuntimeError:
            pass

    async def read(self) -> bytes:
        """The next message. Raises TransferError at the end."""
        try:
            message = await self._read()
        except grpc.RpcError as error:
            raise TransferError(f"the stream broke: {_details(error)}") from error
        except (asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            raise TransferError(f"the stream has ended: {error}") from error
        if message is grpc.aio.EOF:
            raise TransferError("the other side ended the stream")
        return message

    async def say(self, message: bytes) -> None:
        """Write now; only before ``pump`` runs."""
        try:
            await self._write(message)
        except (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            raise TransferError(f"the stream broke: {error}") from error

    async def pump(self) -> None:
        """Write what is queued until the end."""
        while True:
            while self._queue:
                message = self._queue.popleft()
                self._queued_bytes -= len(message)
                await self.say(message)
            if self._closing:
                return
            self._wake.clear()
            if not self._queue and not self._closing:
                await self._wake.wait()

    async def messages(self) -> AsyncIterator[bytes]:
        """All that comes, while what is queued goes out. Ends when either direction does, without an error."""
        pump = asyncio.ensure_future(self.pump())
        reading: asyncio.Future[bytes] | None = None
        try:
            while True:
                reading = asyncio.ensure_future(self.read())
                await asyncio.wait((pump, reading), return_when=asyncio.FIRST_COMPLETED)
                if pump.done():
                    return
                yield await reading
        except TransferError:
            return
        finally:
            self._closing = True
            for task in (pump, reading):
                if task is not None:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)


def _details(error: grpc.RpcError) -> str:
    details = getattr(error, "details", None)
    return str(details() if callable(details) else error)[:300]


async def prove_as_client(stream: Stream, secret: bytes) -> None:
    """The handshake of who dials. Raises TransferError if the other side does not know the secret."""
    mine = secrets.token_bytes(NONCE)
    await stream.say(HANDSHAKE.encode(Knock(mine)))
    answer = HANDSHAKE.decode(await asyncio.wait_for(stream.read(), HANDSHAKE_S))
    if not isinstance(answer, Challenge) or not is_proof(answer.proof, secret, b"server", mine + answer.nonce):
        raise TransferError("the other side has another secret; give both the same --secret-file")
    await stream.say(HANDSHAKE.encode(Proof(proof(secret, b"client", mine + answer.nonce))))


async def prove_as_server(stream: Stream, secret: bytes) -> None:
    """The handshake of who listens."""
    knock = HANDSHAKE.decode(await asyncio.wait_for(stream.read(), HANDSHAKE_S))
    if not isinstance(knock, Knock) or len(knock.nonce) != NONCE:
        raise TransferError("the other side did not knock")
    mine = secrets.token_bytes(NONCE)
    await stream.say(HANDSHAKE.encode(Challenge(mine, proof(secret, b"server", knock.nonce + mine))))
    answer = HANDSHAKE.decode(await asyncio.wait_for(stream.read(), HANDSHAKE_S))
    if not isinstance(answer, Proof) or not is_proof(answer.proof, secret, b"client", knock.nonce + mine):
        raise TransferError("the other side has another secret; give both the same --secret-file")


def handler(method: str, serve: Callable[[Stream], Awaitable[None]]) -> grpc.GenericRpcHandler:
    """A gRPC handler that gives each call of ``method`` as a Stream to ``serve``."""

    async def call(_: Any, context: grpc.aio.ServicerContext) -> None:
        await serve(Stream(context.read, context.write))

    # Bytes travel as they are: no serialiser on either end.
    return grpc.method_handlers_generic_handler(SERVICE, {method: grpc.stream_stream_rpc_method_handler(call)})


def dial(channel: grpc.aio.Channel, method: str) -> tuple[Stream, Any]:
    """A Stream to ``method`` of the other side, and the call behind it, to be cancelled at the end."""
    call = channel.stream_stream(f"/{SERVICE}/{method}")()
    return Stream(call.read, call.write), call
