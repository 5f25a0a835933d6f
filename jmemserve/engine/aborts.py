"""Requests that were aborted where they were not: the sequence may be on its way there."""

from jmemserve.types import FinishReason

MAX_REMEMBERED = 4096
REMEMBER_S = 60.0


class Aborts:
    """Remembers the newest of them for a while."""

    def __init__(self) -> None:
        self._reasons: dict[str, tuple[float, FinishReason]] = {}

    def remember(self, request_id: str, reason: FinishReason, now: float) -> None:
        self._reasons[request_id] = now, reason

    def take(self, request_id: str) -> FinishReason | None:
        """Why a request that has come in was aborted before, if it was."""
        found = self._reasons.pop(request_id, None)
        return None if found is None else found[1]

    def expire(self, now: float) -> None:
        """Forget the old ones."""
        while self._reasons:
            oldest = next(iter(self._reasons))
            if len(self._reasons) <= MAX_REMEMBERED and now - self._reasons[oldest][0] < REMEMBER_S:
                break
            del self._reasons[oldest]

    def clear(self) -> None:
        self._reasons.clear()
