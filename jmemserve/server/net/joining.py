"""The front-end's end of an instance's stream: it joins, speaks, and is a member for as long as the stream lasts."""

import asyncio
import time

from jmemserve.engine.cluster import Cluster
from jmemserve.errors import JmemserveError, NameTaken, TransferError
from jmemserve.scheduler.messages import Beat, ToInstance, shifted
from jmemserve.server.net.streams import Stream, prove_as_server
from jmemserve.server.net.words import FROM_INSTANCE, HANDSHAKE, TO_INSTANCE, Apply, Refused, Welcome


class RemotePort:
    """A ``Port`` to an instance of another process."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self.closed = ""

    def send(self, message: ToInstance) -> None:
        self._stream.put(TO_INSTANCE.encode(shifted(message, -time.monotonic())))

    def beat(self) -> Beat | None:
        return None  # it beats by itself

    def close(self, reason: str) -> None:
        self.closed = reason
        self._stream.put(TO_INSTANCE.encode(Refused(reason[:1000], False)))
        self._stream.end()


class Joining:
    """Serves the method Join."""

    def __init__(self, cluster: Cluster, secret: bytes):
        self._cluster, self._secret = cluster, secret

    async def serve(self, stream: Stream) -> None:
        """One instance, from its handshake to its end."""
        try:
            await prove_as_server(stream, self._secret)
            apply = HANDSHAKE.decode(await stream.read())
            if not isinstance(apply, Apply):
                raise TransferError("the instance did not apply")
        except (TransferError, TimeoutError):
            return  # whoever it was
        port = RemotePort(stream)
        epoch = max(time.time_ns(), apply.epoch + 1)
        try:
            name = self._cluster.admit(apply.name, epoch, apply.role, apply.facts, port, apply.place)
        except JmemserveError as error:
            await stream.say(HANDSHAKE.encode(Refused(str(error)[:1000], not isinstance(error, NameTaken))))
            return
        reason = "its stream ended"
        try:
            await stream.say(HANDSHAKE.encode(Welcome(name, epoch)))
            async for raw in stream.messages():
                self._cluster.on_message(name, port, FROM_INSTANCE.decode(raw))
            if stream.overflow:
                reason = "it does not take its messages"
        except JmemserveError as error:
            reason = str(error)
            await asyncio.gather(stream.say(TO_INSTANCE.encode(Refused(reason[:1000], True))), return_exceptions=True)
        finally:
            self._cluster.down(name, port, reason)
