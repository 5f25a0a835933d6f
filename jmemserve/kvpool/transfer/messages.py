"""The messages of a transfer, and what its two machines ask of their callers.

    source                                     destination
    Offer(id, tokens, n blocks, layout)   ──▶  hold what is cached, allocate the rest; or Refuse(reason)
    Ship: gather what is lacking          ◀──  Accept(have=k): the first k need not travel
    Data(start, stop, payload) ...        ──▶  Land: write each; when all bytes are in place insert, then
    give the blocks back                  ◀──  Done

    Cancel(reason)                        ──▶  the source gives up, or asks; if it was done already, Done is the answer
    settle elsewhere                      ◀──  Refuse(reason), at any time before Done: nothing is kept here

The destination never ends well before the last Data, so a source that has not sent it knows that it failed, and one
that has asks with Cancel. ``epoch`` is always the source's: an instance that starts anew has a higher one, and what
its former life sent is void.
"""

import dataclasses
from typing import Any

from jmemserve.kvpool.address import BlockAddress


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """May these blocks come? ``private`` travels along unread, for whoever claims the blocks."""

    transfer_id: str  # never used twice, over all instances and epochs
    source: str
    epoch: int
    tokens: tuple[int, ...] | None  # whose keys and values the blocks hold; None: not to be indexed
    num_blocks: int  # at least the whole blocks of tokens
    salt: str
    layout: str  # of a block's bytes; the destination's caller compares it before its receiver sees the offer
    private: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Accept:
    """Yes; the first ``have`` blocks are cached here already."""

    transfer_id: str
    epoch: int
    have: int
    addresses: tuple[BlockAddress, ...]  # at the destination, all num_blocks of them


@dataclasses.dataclass(frozen=True, slots=True)
class Refuse:
    """No, or no longer: the destination keeps nothing and will not go on with the sequence."""

    transfer_id: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """The bytes of the blocks start .. stop of the offer. None of them when all were cached."""

    transfer_id: str
    epoch: int
    start: int
    stop: int
    payload: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """All bytes are in place and the destination answers for the sequence from here on."""

    transfer_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class Cancel:
    """The source gives the transfer up, unless it is done already: the answer says which."""

    transfer_id: str
    source: str
    reason: str


Message = Offer | Accept | Refuse | Data | Done | Cancel


@dataclasses.dataclass(frozen=True, slots=True)
class Send:
    """Put this message into the inbox of that instance."""

    to: str
    message: Message


@dataclasses.dataclass(frozen=True, slots=True)
class Ship:
    """Source: read these blocks and call ``Sender.data`` for them in order, before any other call of the sender.

    There may be none; ``data`` is called with start and stop 0 then.
    """

    transfer_id: str
    destination: str
    blocks: tuple[BlockAddress, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Land:
    """Destination: write the payload into these blocks, then call ``Receiver.landed``, in every case.

    Until then the blocks stay out of other hands, even if the transfer ends.
    """

    transfer_id: str
    blocks: tuple[BlockAddress, ...]
    payload: Any
    last: bool  # nothing else is to come: after ``landed`` the blocks can be claimed
