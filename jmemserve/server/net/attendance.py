"""The instance's end of a second front-end's stream: its requests are served, membership is none of its business."""

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable

from jmemserve.engine.local import Host
from jmemserve.errors import JmemserveError
from jmemserve.scheduler import messages as m
from jmemserve.server.net.streams import HANDSHAKE_S, Stream, prove_as_server
from jmemserve.server.net.words import FROM_INSTANCE, HANDSHAKE, TO_INSTANCE, Apply, Attend, Refused, Welcome

BEAT_S = 0.5
MAX_FRONTENDS = 16
_MAY_SAY = (m.Submit, m.Abort, m.Move, m.Share, m.ResetCache, m.AskPool, m.AskCache)


class Attendance:
    """Serves the method Attend. ``introduce``: the instance as it would apply, and what runs it once that is loaded."""

    def __init__(self, secret: bytes, introduce: Callable[[], tuple[Apply, Host | None]]):
        self._secret, self._introduce = secret, introduce
        self._streams: set[Stream] = set()

    def end(self) -> None:
        """Another life has begun, of which the front-ends hear when they come again. On the loop's thread."""
        for stream in self._streams:
            stream.end()

    async def serve(self, stream: Stream) -> None:
        """One front-end, from its handshake to its end."""
        with contextlib.suppress(JmemserveError, TimeoutError):  # whoever it was, or it dials again
            await prove_as_server(stream, self._secret)
            attend = HANDSHAKE.decode(await asyncio.wait_for(stream.read(), HANDSHAKE_S))
            apply, host = self._introduce()
            if not isinstance(attend, Attend) or not attend.frontend:
                return
            if host is None or len(self._streams) >= MAX_FRONTENDS:
                why = "it loads" if host is None else f"{len(self._streams)} front-ends attend it already"
                await stream.say(HANDSHAKE.encode(Refused(f"{apply.name}: {why}", False)))
                return
            self._streams.add(stream)
            try:
                await stream.say(HANDSHAKE.encode(apply))
                answer = HANDSHAKE.decode(await asyncio.wait_for(stream.read(), HANDSHAKE_S))
                if isinstance(answer, Welcome):
                    await self._carry(stream, attend.frontend, host)
            finally:
                self._streams.discard(stream)

    async def _carry(self, stream: Stream, frontend: str, host: Host) -> None:
        """Messages both ways until the stream ends; then what the front-end has asked for ends too."""

        def say(message: m.FromInstance) -> None:
            stream.put(FROM_INSTANCE.encode(message))

        instance = host.instance
        say(host.ready())
        instance.post(functools.partial(instance.frontends.join, frontend, say))
        beating = asyncio.ensure_future(_beat(host, frontend, say))
        try:
            async for raw in stream.messages():
                message = m.shifted(TO_INSTANCE.decode(raw), time.monotonic())
                if not isinstance(message, _MAY_SAY):
                    return
                instance.post(message)
        finally:
            beating.cancel()
            instance.post(functools.partial(instance.frontends.leave, frontend, say))


async def _beat(host: Host, frontend: str, say: Callable[[m.FromInstance], None]) -> None:
    while True:
        beat = host.beat(frontend)
        if beat is not None:
            say(beat)
        await asyncio.sleep(BEAT_S)
