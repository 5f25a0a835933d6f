"""The front-ends that one instance serves: who hears what.

    home ──────── membership, requests, cache ───▶ Instance      (the front-end that the instance has joined)
    second ones ── requests, cache ──────────────▶               (they attend it: ``join``, ``leave``)

What belongs to a request goes to the front-end whose name is in its id, what anybody may use goes to all, and each is
told of the cache in its own time. A request of a front-end that is not here has nobody who waits for it.
"""

from collections.abc import Callable, Iterable

from jmemserve.engine.cache_news import CacheTeller
from jmemserve.kvpool import BlockPool
from jmemserve.scheduler.messages import FromInstance, News, Shared, frontend_of
from jmemserve.types import Event

Say = Callable[[FromInstance], None]


class Frontends:
    """Of one instance; call from its thread. ``say`` must not block and goes to the home, whichever that is."""

    def __init__(self, pool: BlockPool, say: Say):
        self._pool, self._say = pool, say
        self.home = ""
        self._says: dict[str, Say] = {}
        self._tellers: dict[str, CacheTeller] = {}
        self.lead("")

    def __contains__(self, name: str) -> bool:
        return name in self._says

    def lead(self, name: str) -> None:
        """The home is this front-end now; it hears of the cache once ``tell_cache`` begins that."""
        self._drop(self.home)
        self.home = name
        self._take(name, self._say)

    def join(self, name: str, say: Say) -> None:
        """A second front-end is there, perhaps once more; it hears of the cache at once."""
        self._take(name, say)
        self._tellers[name].begin()

    def leave(self, name: str, say: Say | None = None) -> bool:
        """A front-end is gone; False if it has come again meanwhile, with another ``say``, or was not here."""
        if name not in self._says or say not in (None, self._says[name]):
            return False
        self._drop(name)
        return True

    def clear(self) -> None:
        """All are gone but the home, which has yet to ask for the cache anew."""
        for name in [name for name in self._says if name != self.home]:
            self._drop(name)
        for teller in self._tellers.values():
            teller.end()

    def awaits(self, request_id: str) -> bool:
        """Does anybody wait for this request?"""
        return frontend_of(request_id) in self._says

    def answer(self, name: str, message: FromInstance) -> None:
        """To one of them; nothing if it is gone."""
        say = self._says.get(name)
        if say is not None:
            say(message)

    def shared(self, message: Shared) -> None:
        """To who asked for the sharing."""
        self.answer(frontend_of(message.request_id), message)

    def tell_all(self, message: FromInstance) -> None:
        """To everybody."""
        for say in self._says.values():
            say(message)

    def news(self, events: Iterable[Event]) -> None:
        """To each the events of its own requests."""
        by_frontend: dict[str, list[Event]] = {}
        for event in events:
            by_frontend.setdefault(frontend_of(event.request_id), []).append(event)
        for name, own in by_frontend.items():
            self.answer(name, News(tuple(own)))

    def tell_cache(self, name: str | None = None) -> None:
        """Tell a front-end, by default the home, all that is cached and every change from now on."""
        teller = self._tellers.get(self.home if name is None else name)
        if teller is not None:
            teller.begin()

    def poll(self, now: float) -> None:
        """Say what is due of the cache."""
        for teller in self._tellers.values():
            teller.poll(now)

    def _take(self, name: str, say: Say) -> None:
        self._says[name], self._tellers[name] = say, CacheTeller(self._pool, say)

    def _drop(self, name: str) -> None:
        self._says.pop(name, None)
        self._tellers.pop(name, None)
