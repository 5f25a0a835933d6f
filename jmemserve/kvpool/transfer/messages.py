"""The messages of a transfer, and what its two machines ask of their callers.

    source                                     destination
    Offer(id, tokens, n blocks, medium)   ──▶  hold what is cached, allocate the rest; or Refuse(reason)
    Ship: read what is lacking and ready  ◀──  Accept(have=k): the first k need not travel
    Data(start, stop, part, ticket) ...   ──▶  Land: fetch and write each; in any order
    give that copy back, ship more        ◀──  Landed(start, part)
    Close(private)                        ──▶  when all bytes are in place insert, then
    give the blocks back                  ◀──  Done(addresses)

    Cancel(reason)                        ──▶  the source gives up, or asks; if it was done already, Done is the answer
    settle elsewhere                      ◀──  Refuse(reason), at any time before Done: nothing is kept here
    Renew(ids)                           ◀──▶  what I have with you is alive: leases and deadlines run anew

The destination never ends well before Close, so a source that has not sent it knows that it failed, and one that has
asks with Cancel. ``epoch`` is always the sender's own: an instance that starts anew has a higher one, and what its
former life sent is void. All fields are plain values; addresses in a message are the destination's.
"""

import dataclasses
import enum
from typing import Any

from jmemserve.kvpool.address import BlockAddress, Medium

RENEWED = 4096  # addresses in one Renew
MAX_PRIVATE = 1 << 20  # bytes of a transfer's private part
WHOLE = -1  # ``part`` of data that has all layers; else layer * 2 + (0 for keys, 1 for values)


class Granularity(enum.Enum):
    """How the bytes of a transfer are cut (paper section 5.2): per block of tokens, by_layer makes 2L transfer calls
    and 2L network calls, by_request 1 and 2L, by_request_agg 1 and 1."""

    BY_LAYER = "by_layer"
    BY_REQUEST = "by_request"
    BY_REQUEST_AGG = "by_request_agg"
    AUTO = "auto"  # what measured best


class Flags(enum.IntFlag):
    """What a transfer asks of its destination."""

    NONE = 0
    DRAM = 1  # land in host memory
    MIXED = 2  # land in HBM as far as there is room, the rest in host memory
    ALL_BLOCKS = 4  # let all blocks travel, those too that the destination has
    CLAIM = 8  # when it is done, the blocks are for the destination's owner, together with ``private``
    NO_CHECKSUM = 16  # do not check the bytes

    @property
    def medium(self) -> Medium:
        """Where the blocks are to land."""
        return Medium.DRAM if self & Flags.DRAM else Medium.MIXED if self & Flags.MIXED else Medium.HBM


@dataclasses.dataclass(frozen=True, slots=True)
class Hello:
    """What two instances tell each other before anything else."""

    instance: str
    epoch: int
    schema: str  # layout of a block and whose keys and values they are: equal, or the two cannot exchange blocks
    endpoints: dict[str, Any]  # of its transports, by name


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """May these blocks come?"""

    transfer_id: str  # never used twice, over all instances and epochs
    source: str
    epoch: int
    tokens: tuple[int, ...] | None  # whose keys and values the blocks hold
    insert: bool  # put the whole blocks of tokens into the index when all is in place
    num_blocks: int  # at least the whole blocks of tokens
    salt: str
    adapter: str
    flags: Flags
    parts: int  # 1, or 2 * layers: how often data comes for every block
    destination: tuple[BlockAddress, ...]  # allocated for the source before; empty: allocate now


@dataclasses.dataclass(frozen=True, slots=True)
class Accept:
    """Yes; the first ``have`` blocks are cached here already."""

    transfer_id: str
    epoch: int
    have: int
    addresses: tuple[BlockAddress, ...]  # all num_blocks of them


@dataclasses.dataclass(frozen=True, slots=True)
class Refuse:
    """No, or no longer: the destination keeps nothing and will not go on with the sequence."""

    transfer_id: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """One part of the bytes of the blocks start .. stop of the offer can be fetched with this ticket."""

    transfer_id: str
    epoch: int
    start: int
    stop: int
    part: int
    ticket: dict[str, Any]  # the transport's; plain values


@dataclasses.dataclass(frozen=True, slots=True)
class Landed:
    """The bytes of one Data are in place: the source needs to keep their copy no longer and may send more."""

    transfer_id: str
    start: int
    part: int


@dataclasses.dataclass(frozen=True, slots=True)
class Close:
    """All data was sent. ``private`` travels unread, for the destination's owner."""

    transfer_id: str
    epoch: int
    private: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """All bytes are in place and, if asked for, in the index."""

    transfer_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class Cancel:
    """The source gives the transfer up, unless it is done already: the answer says which."""

    transfer_id: str
    source: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Allocate:
    """Give the source this many blocks, on a lease that its Renew extends."""

    call_id: str
    source: str
    epoch: int
    num_blocks: int
    medium: Medium


@dataclasses.dataclass(frozen=True, slots=True)
class Allocated:
    """The answer: the addresses, or none and the reason."""

    call_id: str
    addresses: tuple[BlockAddress, ...]
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Free:
    """The source gives back blocks that were allocated for it."""

    source: str
    epoch: int
    addresses: tuple[BlockAddress, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Renew:
    """One message per peer and period, or a few: these transfers, in either direction, and these allocations are alive.

    What the peer holds for the source and the source does not name runs out: its address was lost on the way.
    """

    source: str
    epoch: int
    transfer_ids: tuple[str, ...]
    addresses: tuple[BlockAddress, ...] = ()  # of the peer, allocated for the source; at most RENEWED of them


Message = Offer | Accept | Refuse | Data | Landed | Close | Done | Cancel | Allocate | Allocated | Free | Renew


@dataclasses.dataclass(frozen=True, slots=True)
class Send:
    """Put this message into the inbox of that instance."""

    to: str
    message: Message


@dataclasses.dataclass(frozen=True, slots=True)
class Ship:
    """Source: read these blocks, and for each stretch and part that a ticket was made for call ``Sender.data``.

    ``sources[i]`` goes to ``targets[i]``; the stretches together have every block once for every part.
    """

    transfer_id: str
    destination: str
    start: int  # place of the first in the offer
    sources: tuple[BlockAddress, ...]
    targets: tuple[BlockAddress, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Land:
    """Destination: fetch and write these bytes, then call ``Receiver.landed`` or ``Receiver.failed``, in every case.

    Until then the blocks stay out of other hands, even if the transfer ends.
    """

    transfer_id: str
    source: str
    start: int  # place of the first block in the offer
    blocks: tuple[BlockAddress, ...]
    part: int
    ticket: dict[str, Any]
    checked: bool  # the bytes have to agree with their checksums


@dataclasses.dataclass(frozen=True, slots=True)
class Arrived:
    """Destination: a transfer is done. With the flag CLAIM the blocks are the owner's now, who frees them."""

    transfer_id: str
    source: str
    private: bytes
    blocks: tuple[BlockAddress, ...]  # empty without CLAIM
    tokens: tuple[int, ...] | None
    given: tuple[BlockAddress, ...] = ()  # allocated for the source from now on
    offered: float = dataclasses.field(default=0.0, compare=False)  # when the offer came, on the destination's clock
    moved: int = dataclasses.field(default=0, compare=False)  # blocks whose bytes came; the others were there
