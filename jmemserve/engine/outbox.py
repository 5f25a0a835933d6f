"""News of one instance's sequences, from the commit of a step until the front-ends are told, once per turn."""

from collections.abc import Sequence as Row

from jmemserve.engine.frontends import Frontends
from jmemserve.engine.runner import Flight
from jmemserve.scheduler.messages import Tokens
from jmemserve.scheduler.sequence import Sequence
from jmemserve.types import Event, FinishReason, TokenLogprobs, Usage


class Outbox:
    """Call from the instance's thread."""

    def __init__(self, frontends: Frontends):
        self._frontends = frontends
        self._events: list[Event] = []

    def tokens(self, gained: Row[tuple[Sequence, int]], about: dict[int, TokenLogprobs]) -> None:
        """Sequences that go on got a token each; ``about``: see ``described``."""
        self._events += [
            Event(
                seq.request.id,
                (token,),
                (about[id(seq)],) if about and id(seq) in about else (),
                start=len(seq.tokens) - len(seq.request.prompt) - 1,
            )
            for seq, token in gained
        ]

    def column(self, tokens: Tokens) -> None:
        """The same of many that go on, at once."""
        self.flush()  # what was before
        self._frontends.tokens(tokens)

    def end(
        self, seq: Sequence, reason: FinishReason, token: int | None = None, about: TokenLogprobs | None = None
    ) -> None:
        """A sequence has ended, perhaps with a last token."""
        prompt = len(seq.request.prompt)
        made = len(seq.tokens) - prompt
        shown = () if token is None else (token,)
        self._events.append(
            Event(
                seq.request.id,
                shown,
                () if token is None or about is None else (about,),
                finish=reason,
                usage=Usage(prompt, made, seq.cached_tokens),
                timings=seq.stamps.timings(),
                start=made - len(shown),
            )
        )

    def flush(self) -> None:
        """Tell the front-ends."""
        if self._events:
            events, self._events = self._events, []
            self._frontends.news(events)

    def clear(self) -> None:
        """What was not told is nobody's any more."""
        self._events.clear()


def described(flight: Flight, entries: list[TokenLogprobs | None] | None) -> dict[int, TokenLogprobs]:
    """The log probabilities of a flight by the identity of the sequence; empty for most."""
    if entries is None:
        return {}
    rows = zip(flight.plan.slices, entries, strict=True)
    return {id(piece.sequence): entry for piece, entry in rows if entry is not None}
