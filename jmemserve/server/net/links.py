"""Links between instances of different processes: one gRPC stream per pair, dialled by the younger one.

dials                          listens
handshake (``streams``)   ◀──▶
Hello                      ──▶
                          ◀──  Hello, or Refused(reason)
messages                  ◀──▶ the transfer protocol's
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from typing import Any

import grpc
import grpc.aio

from jmemserve.engine.links import Side
from jmemserve.engine.messages import FromPeer
from jmemserve.errors import JmemserveError, TransferError
from jmemserve.kvpool import transfer as tx
from jmemserve.server.net.streams import (
    OPTIONS,
    SERVER_OPTIONS,
    Stream,
    dial,
    handler,
    prove_as_client,
    prove_as_server,
)
from jmemserve.server.net.words import BETWEEN_PEERS, Refused

CONNECT_S = 10.0


class GrpcLinks:
    """``engine.links.Links`` over gRPC. All public methods are for any thread but the loop's."""

    def __init__(
        self,
        side: Side,
        secret: bytes,
        loop: asyncio.AbstractEventLoop,
        more: Sequence[grpc.GenericRpcHandler] = (),
    ):
        """``more``: handlers on the same port that are not for peers."""
        self.address = ""
        self._side, self._secret, self._loop, self._more = side, secret, loop, tuple(more)
        self._streams: dict[str, Stream] = {}
        self._lock = threading.Lock()
        self._server: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self, address: str, advertise: str | None) -> None:
        """Accept links at "host:port" (port 0: any free one); others dial ``advertise`` instead, if it is given.

        Raises TransferError.
        """
        host = address.rpartition(":")[0]
        port = self._wait(self._listen(address))
        self.address = advertise or f"{host}:{port}"

    async def _listen(self, address: str) -> int:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers((handler("Link", self._serve), *self._more))
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise TransferError(f"--listen {address} cannot be used: {error}") from error
        await server.start()
        self._server = server
        return port

    def connect(self, address: str) -> str:
        try:
            return self._wait(self._connect(address))
        except (TimeoutError, CancelledError) as error:
            raise TransferError(f"no link to {address}: {error or 'no answer'}") from error

    async def _connect(self, address: str) -> str:
        channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        stream, call = dial(channel, "Link")
        up: asyncio.Future[str] = self._loop.create_future()

        async def live() -> None:
            try:
                await self._introduce(stream, up)
            except (JmemserveError, TimeoutError) as error:
                if not up.done():
                    up.set_exception(TransferError(f"no link to {address}: {error or 'no answer'}"))
            finally:
                call.cancel()
                await channel.close()

        task = self._loop.create_task(live())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.wait_for(asyncio.shield(up), CONNECT_S)
        except TimeoutError:
            task.cancel()
            raise TransferError(f"no link to {address} within {CONNECT_S:g} s") from None

    async def _introduce(self, stream: Stream, up: asyncio.Future[str]) -> None:
        await prove_as_client(stream, self._secret)
        hello = await self._off_loop(self._side.hello)
        await stream.say(BETWEEN_PEERS.encode(hello))
        answer = BETWEEN_PEERS.decode(await stream.read())
        if isinstance(answer, Refused):
            raise TransferError(f"it refused: {answer.reason}")
        if not isinstance(answer, tx.Hello):
            raise TransferError("it did not say hello")
        try:
            peer = await self._off_loop(lambda: self._side.accept(answer))
        except JmemserveError as error:
            await stream.say(BETWEEN_PEERS.encode(Refused(str(error)[:1000], True)))
            raise
        await self._carry(peer, stream, up)

    async def _serve(self, stream: Stream) -> None:
        """Of a peer that dials here."""
        try:
            await prove_as_server(stream, self._secret)
            hello = BETWEEN_PEERS.decode(await stream.read())
            if not isinstance(hello, tx.Hello):
                return
            try:
                peer = await self._off_loop(lambda: self._side.accept(hello))
                mine = await self._off_loop(self._side.hello)
            except JmemserveError as error:
                await stream.say(BETWEEN_PEERS.encode(Refused(str(error)[:1000], True)))
                return
            await stream.say(BETWEEN_PEERS.encode(mine))
        except (JmemserveError, TimeoutError):
            return
        await self._carry(peer, stream, None)

    async def _carry(self, peer: str, stream: Stream, up: asyncio.Future[str] | None) -> None:
        """Messages of a link that is up, until it ends. A link takes the place of a former one with the same peer."""
        with self._lock:
            old, self._streams[peer] = self._streams.get(peer), stream
        if old is not None:
            old.end()
        try:
            if not await self._off_loop(lambda: self._side.knows(peer)):
                raise TransferError(f"{peer} was given up while it linked up")
            if up is not None and not up.done():
                up.set_result(peer)
            async for raw in stream.messages():
                try:
                    message = BETWEEN_PEERS.decode(raw)
                except TransferError:
                    continue  # nothing that this version knows
                if not isinstance(message, Refused):
                    self._side.on_message(FromPeer(peer, message))
        finally:
            with self._lock:
                current = self._streams.get(peer) is stream
                if current:
                    del self._streams[peer]
            if current:  # else the new link says what becomes of the peer
                self._side.on_down(peer)

    def send(self, peer: str, message: tx.Message) -> None:
        with self._lock:
            stream = self._streams.get(peer)
        if stream is None:
            raise TransferError(f"there is no link to {peer!r}")
        stream.put(BETWEEN_PEERS.encode(message))

    def drop(self, peer: str) -> None:
        with self._lock:
            stream = self._streams.get(peer)
        if stream is not None:
            stream.end()

    def peers(self) -> list[str]:
        with self._lock:
            return list(self._streams)

    def close(self) -> None:
        with self._lock:
            streams = list(self._streams.values())
        for stream in streams:
            stream.end()
        if self._server is not None and self._loop.is_running():
            self._wait(self._server.stop(0.5))

    def _wait[T](self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CONNECT_S + 5)

    async def _off_loop[T](self, function: Callable[[], T]) -> T:
        """Call what waits for the instance's thread."""
        return await asyncio.to_thread(function)
