"""What the gateway keeps of a request in flight, and how its news are put in order."""

import dataclasses

from jmemserve.types import Event, FinishReason, Request


@dataclasses.dataclass(slots=True)
class Ticket:
    """A request in flight. The tokens before ``generated``'s end were delivered, and nothing after it."""

    outer_id: str
    request: Request  # its id is that of the present attempt
    number: int
    attempt: int = 1
    homes: tuple[str, ...] = ()  # where the present attempt may be, in the order that it goes there; (): parked
    uncached: int = 0  # tokens that the first of them has to compute, as the router believes
    generated: list[int] = dataclasses.field(default_factory=list)
    first_token: float = 0.0
    early: dict[int, tuple[str, Event]] = dataclasses.field(default_factory=dict)  # (from whom, what) by place
    failures: int = 0  # attempts that were lost since the last token
    parked: float = 0.0
    ending: FinishReason | None = None  # an abort is on its way
    asked: float = 0.0  # when a move was asked for
    source: str | None = None  # the peer that sends blocks to the first home, which hears of the request after that
    source_until: float = 0.0
    decode: str = ""  # where the present attempt is to be decoded
    heard: str = ""  # id of the newest attempt of which tokens were delivered

    @property
    def known(self) -> tuple[int, ...]:
        return (*self.request.prompt, *self.generated)

    def goes_on(self, instance: str, event: Event) -> bool:
        """Is this what nearly always comes: the next tokens of an attempt that runs, from where the last ones were?"""
        return (
            event.start == len(self.generated)
            and event.finish is None
            and not self.early
            and self.heard == event.request_id
            and self.homes[:1] == (instance,)
        )

    def next(self) -> tuple[str, Event] | None:
        """The waiting event that continues the output, without what was delivered before, and who sent it."""
        have = len(self.generated)
        for start in sorted(self.early):
            if start > have:
                return None
            instance, event = self.early.pop(start)
            stop, skip = start + len(event.tokens), have - start
            if stop > have or event.finish is not None and stop == have:
                rest = event.tokens[skip:], event.logprobs[skip:]
                return instance, dataclasses.replace(event, start=have, tokens=rest[0], logprobs=rest[1])
        return None
