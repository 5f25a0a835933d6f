"""What is said to an instance, besides the transfer protocol's own messages (``kvpool.transfer``). Plain values."""

import dataclasses

from jmemserve.kvpool import transfer as tx
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
class FromPeer:
    """A message of the transfer protocol from another instance."""

    peer: str
    message: tx.Message
