"""What a caller sees of a request: deltas, the end of each output, and outputs folded from these. Plain values."""

import dataclasses
from collections.abc import Iterable

from jmemserve.errors import JmemserveError
from jmemserve.types import FinishReason, Timings, TokenLogprobs, Usage


@dataclasses.dataclass(frozen=True, slots=True)
class Delta:
    """What was made since the last delta of the same output."""

    request_id: str
    index: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """The end of one output."""

    request_id: str
    index: int
    finish: FinishReason
    matched_stop: str | None = None
    usage: Usage = Usage()
    timings: Timings = Timings()
    error: JmemserveError | None = None  # set exactly if finish is ERROR


Message = Delta | Finished


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """One whole output of a request."""

    request_id: str
    index: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish: FinishReason
    matched_stop: str | None
    usage: Usage
    timings: Timings
    error: JmemserveError | None


def fold(messages: Iterable[Message]) -> list[Output]:
    """The outputs that all messages of one request tell of, by index."""
    deltas: dict[int, list[Delta]] = {}
    outputs = []
    for message in messages:
        if isinstance(message, Delta):
            deltas.setdefault(message.index, []).append(message)
            continue
        parts = deltas.pop(message.index, [])
        outputs.append(
            Output(
                message.request_id,
                message.index,
                tuple(token for part in parts for token in part.tokens),
                "".join(part.text for part in parts),
                tuple(logprobs for part in parts for logprobs in part.logprobs),
                message.finish,
                message.matched_stop,
                message.usage,
                message.timings,
                message.error,
            )
        )
    return sorted(outputs, key=lambda output: output.index)
