"""What is said to an instance, besides the transfer protocol's own messages (``kvpool.transfer``). Plain values."""

import dataclasses

from jmemserve.scheduler.sequence import Stamps
from jmemserve.types import FinishReason, Request


@dataclasses.dataclass(frozen=True, slots=True)
class Submit:
    """Start a request here; ``decode`` is the instance that the router chose to decode it."""

    request: Request
    decode: str


@dataclasses.dataclass(frozen=True, slots=True)
class Abort:
    """End a request in whatever state it is. An unknown id is remembered: the sequence may be on its way here."""

    request_id: str
    reason: FinishReason


@dataclasses.dataclass(frozen=True, slots=True)
class ResetCache:
    """Forget every cached prefix."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stop:
    """End the instance's thread."""


@dataclasses.dataclass(frozen=True, slots=True)
class Handover:
    """The state of a sequence that moves to another instance: what it needs besides its blocks."""

    request: Request
    tokens: tuple[int, ...]  # the prompt and what was generated
    computed: int  # tokens whose keys and values travel
    cached_tokens: int
    stamps: Stamps
