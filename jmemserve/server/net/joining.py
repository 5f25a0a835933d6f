"""The front-end's end of an instance's stream: it joins, speaks, and is a member for as long as the stream lasts.

A second front-end follows: it hears who is there, and dials the instances itself (``attending``).
"""

import asyncio
import time

import grpc

from jmemserve.engine.cluster import Cluster
from jmemserve.errors import JmemserveError, NameTaken, TransferError, Unavailable
from jmemserve.scheduler.following import Following
from jmemserve.scheduler.messages import Beat, ToInstance, shifted
from jmemserve.server.net.streams import Stream, handler, prove_as_server
from jmemserve.server.net.words import FROM_INSTANCE, HANDSHAKE, TO_INSTANCE, Apply, Follow, Refused, Welcome

MAX_SECONDS = 16  # front-ends that follow this one


class RemotePort:
    """A ``Port`` to an instance, or to a front-end, of another process."""

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


async def be_member(cluster: Cluster, stream: Stream, apply: Apply, epoch: int) -> None:
    """What an instance that has applied says until its end, if it is admitted in this epoch."""
    port = RemotePort(stream)
    try:
        name = cluster.admit(apply.name, epoch, apply.role, apply.facts, port, apply.place)
    except JmemserveError as error:
        await stream.say(HANDSHAKE.encode(Refused(str(error)[:1000], not isinstance(error, NameTaken))))
        raise
    reason = "its stream ended"
    try:
        await stream.say(HANDSHAKE.encode(Welcome(name, epoch, cluster.name)))
        async for raw in stream.messages():
            cluster.on_message(name, port, FROM_INSTANCE.decode(raw))
        if stream.overflow:
            reason = "it does not take its messages"
    except JmemserveError as error:
        reason = str(error)
        await asyncio.gather(stream.say(TO_INSTANCE.encode(Refused(reason[:1000], True))), return_exceptions=True)
    finally:
        cluster.down(name, port, reason)


class Joining:
    """Serves the methods Join, of instances, and Follow, of further front-ends."""

    def __init__(self, cluster: Cluster, secret: bytes, facts: tuple[tuple[str, str], ...]):
        """``facts``: what a front-end must have in common with this one."""
        self._cluster, self._secret, self._facts = cluster, secret, dict(facts)
        self._seconds: set[str] = set()

    async def join(self, stream: Stream) -> None:
        """One instance, from its handshake to its end."""
        try:
            await prove_as_server(stream, self._secret)
            apply = HANDSHAKE.decode(await stream.read())
            if not isinstance(apply, Apply):
                raise TransferError("the instance did not apply")
            # A life that nobody here has seen the end of goes on: other front-ends have requests there.
            goes_on = apply.epoch and all(record.name != apply.name for record in self._cluster.members())
            epoch = apply.epoch if goes_on else max(time.time_ns(), apply.epoch + 1)
            await be_member(self._cluster, stream, apply, epoch)
        except (JmemserveError, TimeoutError):
            return  # whoever it was, or it knows why

    async def follow(self, stream: Stream) -> None:
        """One front-end, from its handshake to its end."""
        name = ""
        try:
            await prove_as_server(stream, self._secret)
            follow = HANDSHAKE.decode(await stream.read())
            if not isinstance(follow, Follow) or not follow.frontend:
                return
            if follow.frontend in self._seconds or len(self._seconds) >= MAX_SECONDS:
                full = f"{len(self._seconds)} front-ends follow this one already"
                await stream.say(HANDSHAKE.encode(Refused(full, False)))
                return
            try:
                self._check(follow)
            except Unavailable as error:
                await stream.say(HANDSHAKE.encode(Refused(str(error)[:1000], True)))
                return
            name = follow.frontend
            self._seconds.add(name)
            await stream.say(HANDSHAKE.encode(Welcome("", 0, self._cluster.name)))
            self._cluster.watch(name, RemotePort(stream))
            async for _ in stream.messages():
                pass  # it has nothing to say
        except (JmemserveError, TimeoutError):
            return
        finally:
            if name:
                self._seconds.discard(name)
                self._cluster.watch(name, None)

    def _check(self, follow: Follow) -> None:
        """Raise Unavailable, with what to change, if it cannot follow."""
        for fact, value in follow.facts:
            own = self._facts.get(fact, value)
            if own != value:
                raise Unavailable(
                    f"its {fact} is {value}, that of this one is {own}; start it with the same model and flags"
                )


def doors(
    cluster: Cluster, following: Following | None, secret: bytes, facts: tuple[tuple[str, str], ...]
) -> tuple[grpc.GenericRpcHandler, ...]:
    """What a front-end serves for instances and other front-ends."""
    if following is not None:
        refuse = Redirecting(following.primary, secret).refuse
        return handler("Join", refuse), handler("Follow", refuse)
    joining = Joining(cluster, secret, facts)
    return handler("Join", joining.join), handler("Follow", joining.follow)


class Redirecting:
    """Serves the same methods at a front-end that follows another one: all are sent there."""

    def __init__(self, primary: str, secret: bytes):
        self._primary, self._secret = primary, secret

    async def refuse(self, stream: Stream) -> None:
        """Say where to go."""
        reason = f"this front-end follows another one: --join {self._primary} instead"
        try:
            await prove_as_server(stream, self._secret)
            await stream.read()
            await stream.say(HANDSHAKE.encode(Refused(reason, True)))
        except (JmemserveError, TimeoutError):
            return
