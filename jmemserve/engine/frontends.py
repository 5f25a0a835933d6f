"""The front-ends that one instance serves: who hears what.

    home ──────── membership, requests, cache ───▶ Instance      (the front-end that the instance has joined)
    second ones ── requests, cache ──────────────▶               (they attend it: ``join``, ``leave``)

What belongs to a request goes to the front-end whose name is in its id, what anybody may use goes to all, and each is
told of the cache in its own time. When one is gone, so are its requests, and the others do not notice.
"""

from collections.abc import Callable, Iterable

from jmemserve.engine.cache_news import CacheTeller
from jmemserve.kvpool import BlockPool
from jmemserve.scheduler.messages import FromInstance, News, Shared, Tokens, frontend_of
from jmemserve.types import Event

Say = Callable[[FromInstance], None]


class Frontends:
    """Of one instance; call from its thread.

    ``say`` must not block and goes to the home, whichever that is; ``drop`` ends the requests that nobody awaits.
    """

    def __init__(self, pool: BlockPool, say: Say, drop: Callable[[], None]):
        self._pool, self._say, self._drop = pool, say, drop
        self._home = ""
        self._says: dict[str, Say] = {"": say}
        self._tellers: dict[str, CacheTeller] = {"": CacheTeller(pool, say)}
        self._rows: tuple[tuple[str, ...], dict[str, list[int]]] = (), {}  # of whom: of the tokens that were told last

    def lead(self, name: str) -> None:
        """The home is this front-end from now on. It hears of the cache once this instance is ``ready``."""
        self.leave(self._home)
        self._home = name
        self._take(name, self._say)

    def join(self, name: str, say: Say) -> None:
        """A second front-end is there, perhaps once more; it hears of the cache at once."""
        self.leave(name)
        self._take(name, say)
        self._tellers[name].begin()

    def leave(self, name: str, say: Say | None = None) -> None:
        """A front-end is gone, unless it has come again meanwhile, with another ``say``."""
        if name in self._says and say in (None, self._says[name]):
            del self._says[name], self._tellers[name]
            self._drop()

    def leave_home(self) -> None:
        """The way to the home is lost."""
        self.leave(self._home)

    def clear(self) -> None:
        """All are gone but the home, which holds this for another life."""
        home = self._says.get(self._home)
        self._says.clear()
        self._tellers.clear()
        if home is not None:
            self._take(self._home, home)

    def ready(self) -> bool:
        """The home has this among those that are ready, and hears of its cache. False: it has heard of it before."""
        teller = self._tellers.get(self._home)
        if teller is None or teller.begun:
            return False
        teller.begin()
        return True

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

    def tokens(self, column: Tokens) -> None:
        """To each the tokens of its own requests."""
        if self._rows[0] is not column.request_ids:
            rows: dict[str, list[int]] = {}
            for row, request_id in enumerate(column.request_ids):
                rows.setdefault(frontend_of(request_id), []).append(row)
            self._rows = column.request_ids, rows
        alone = len(self._rows[1]) == 1
        for name, own in self._rows[1].items():
            self.answer(name, column if alone else column.of(own))

    def tell_cache(self, name: str) -> None:
        """One of them asks for all that is cached."""
        teller = self._tellers.get(name)
        if teller is not None:
            teller.begin()

    def poll(self, now: float) -> None:
        """Say what is due of the cache."""
        for teller in self._tellers.values():
            teller.poll(now)

    def _take(self, name: str, say: Say) -> None:
        self._says[name], self._tellers[name] = say, CacheTeller(self._pool, say)
