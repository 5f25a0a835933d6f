"""Where the last request of each session went. An affinity, nothing else: no answer depends on it."""

from collections import OrderedDict

MAX_SESSIONS = 65_536


class Sessions:
    """The last ``MAX_SESSIONS`` sessions that sent something."""

    def __init__(self) -> None:
        self._homes: OrderedDict[str, tuple[str, str]] = OrderedDict()

    def home(self, session: str) -> tuple[str, str] | None:
        """(prefill, decode) of its last request, or None."""
        return self._homes.get(session)

    def went(self, session: str, home: tuple[str, str]) -> None:
        """A request of this session was routed."""
        self._homes[session] = home
        self._homes.move_to_end(session)
        if len(self._homes) > MAX_SESSIONS:
            self._homes.popitem(last=False)

    def left(self, session: str, home: tuple[str, str], before: tuple[str, str] | None) -> None:
        """A request that went there came to nothing: its session is where it was before, unless it has gone on."""
        if self._homes.get(session) == home:
            if before is None:
                del self._homes[session]
            else:
                self._homes[session] = before
