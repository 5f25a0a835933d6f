"""A second front-end: it follows the primary one to know who is there, and attends every instance that is ready.

primary    ◀── Follow ──▶ Roster, and another whenever it changes; if the primary is lost: dialled again, for ever
instance   ◀── Attend ──▶ as if the instance had joined here, but for membership: that is the primary's
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable

import grpc.aio

from jmemserve.engine.cluster import Cluster
from jmemserve.engine.report import Report
from jmemserve.errors import ConfigError, JmemserveError, TransferError, Unavailable
from jmemserve.scheduler.following import Following
from jmemserve.scheduler.messages import Member, Roster
from jmemserve.server.net.joining import be_member
from jmemserve.server.net.streams import HANDSHAKE_S, OPTIONS, Stream, dial, prove_as_client
from jmemserve.server.net.words import HANDSHAKE, TO_INSTANCE, Apply, Attend, Follow, Refused, Welcome

RETRY_S = 0.2  # between two tries; doubled up to
MAX_RETRY_S = 2.0
GIVE_UP_S = (
    300.0  # an instance that does not answer for so long is dialled again when the primary says that it is ready
)


class Attending:
    """Of one front-end. All on the loop's thread."""

    def __init__(
        self,
        cluster: Cluster,
        following: Following,
        facts: tuple[tuple[str, str], ...],
        secret: bytes,
        report: Report,
    ):
        self._cluster, self._following, self._facts = cluster, following, facts
        self._secret, self._report = secret, report
        self._followed = self._up = False  # ever, since the last try
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until it is cancelled. Raises ConfigError if the primary refuses it before it ever followed."""
        primary, delay, said = self._following.primary, RETRY_S, False
        try:
            while True:
                self._up = False
                try:
                    await self._dial(primary, "Follow", self._follow)
                    error: BaseException = Unavailable("the stream ended")
                except (JmemserveError, TimeoutError) as caught:
                    error = caught
                if isinstance(error, ConfigError) and not self._followed:
                    raise error
                if self._up or not said:
                    self._report.line(f"no word of the front-end at {primary} ({error}); going on without it")
                    delay, said = RETRY_S, True
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_RETRY_S)
        finally:
            for task in list(self._tasks.values()):
                task.cancel()

    async def _dial(self, address: str, method: str, talk: Callable[[Stream], Awaitable[None]]) -> None:
        """One stream, from the handshake to its end."""
        channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        stream, call = dial(channel, method)
        try:
            await prove_as_client(stream, self._secret)
            await talk(stream)
        finally:
            call.cancel()
            await channel.close()

    async def _follow(self, stream: Stream) -> None:
        await stream.say(HANDSHAKE.encode(Follow(self._cluster.name, self._facts)))
        answer = HANDSHAKE.decode(await asyncio.wait_for(stream.read(), HANDSHAKE_S))
        if isinstance(answer, Refused):
            kind = ConfigError if answer.final else Unavailable
            raise kind(f"{self._following.primary} does not take this front-end: {answer.reason}")
        if not isinstance(answer, Welcome):
            raise TransferError("the primary front-end did not answer")
        self._followed = self._up = True
        self._report.line(f"follows the front-end at {self._following.primary}")
        life = answer.frontend
        async for raw in stream.messages():
            roster = TO_INSTANCE.decode(raw)
            if not isinstance(roster, Roster):
                return
            self._cluster.change(functools.partial(self._following.follow, life, roster))
            for name in self._following.wanted:
                if name not in self._tasks:
                    task = self._tasks[name] = asyncio.ensure_future(self._attend(name))
                    task.add_done_callback(functools.partial(self._over, name))

    def _over(self, name: str, task: asyncio.Task[None]) -> None:
        del self._tasks[name]

    async def _attend(self, name: str) -> None:
        """Have one instance for as long as it is wanted."""
        loop = asyncio.get_running_loop()
        delay, heard, said = RETRY_S, loop.time(), False
        while (member := self._following.wanted.get(name)) is not None:
            try:
                await self._dial(member.address, "Attend", functools.partial(self._serve, member))
                delay, heard, said = RETRY_S, loop.time(), False
            except (JmemserveError, TimeoutError) as error:
                if not said:
                    said = True
                    self._report.line(f"{name} cannot be attended ({error}); trying again")
                if loop.time() - heard > GIVE_UP_S:
                    self._following.wanted.pop(name, None)
                    return
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_RETRY_S)

    async def _serve(self, member: Member, stream: Stream) -> None:
        await stream.say(HANDSHAKE.encode(Attend(self._cluster.name)))
        apply = HANDSHAKE.decode(await asyncio.wait_for(stream.read(), HANDSHAKE_S))
        if not isinstance(apply, Apply) or apply.name != member.name:
            raise TransferError(apply.reason if isinstance(apply, Refused) else "another instance answered")
        await be_member(self._cluster, stream, apply, apply.epoch)
