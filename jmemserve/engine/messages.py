"""What an instance gets besides the messages of its front-end (``scheduler.messages``). Plain values."""

import dataclasses

from jmemserve.kvpool import transfer as tx


@dataclasses.dataclass(frozen=True, slots=True)
class Stop:
    """End the instance's thread."""


@dataclasses.dataclass(frozen=True, slots=True)
class FromPeer:
    """A message of the transfer protocol from another instance."""

    peer: str
    message: tx.Message
