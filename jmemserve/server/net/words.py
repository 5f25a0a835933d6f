"""The messages between processes as bytes: what front-end and instances say, and the transfer protocol's own."""

import dataclasses

from jmemserve.config import Role
from jmemserve.kvpool import transfer as tx
from jmemserve.kvpool.net.codec import Codec
from jmemserve.scheduler import messages as m


@dataclasses.dataclass(frozen=True, slots=True)
class Knock:
    """The first word of who dials."""

    nonce: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Challenge:
    """The answer: ``proof`` of knowing the secret."""

    nonce: bytes
    proof: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Proof:
    """Who dials knows the secret too."""

    proof: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Apply:
    """An instance wants to become a member. ``epoch`` 0: its first life, else the one before."""

    name: str  # empty: any
    epoch: int
    role: Role
    facts: tuple[tuple[str, str], ...]
    place: str


@dataclasses.dataclass(frozen=True, slots=True)
class Welcome:
    """It is one, under this name and in this epoch, of a front-end with this name, which holds for one life of it."""

    name: str
    epoch: int
    frontend: str


@dataclasses.dataclass(frozen=True, slots=True)
class Attend:
    """A second front-end wants to send requests to the instance, which answers by applying to it."""

    frontend: str


@dataclasses.dataclass(frozen=True, slots=True)
class Follow:
    """A second front-end wants to hear who is there; the answer is Welcome, without a name, or Refused."""

    frontend: str
    facts: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """It is none, or no longer, and the stream ends."""

    reason: str
    final: bool  # another try is of no use


HANDSHAKE = Codec(
    dict(enumerate((Knock, Challenge, Proof, Apply, Welcome, Refused, Attend, Follow))), max_bytes=1 << 16
)
TO_INSTANCE = Codec(
    dict(
        enumerate(
            (
                *(m.Submit, m.Abort, m.Move, m.Probe, m.Roster, m.ChangeRole, m.ResetCache, m.AskPool, m.Leave),
                *(m.Share, m.AskCache),
                Refused,
            )
        )
    )
)
FROM_INSTANCE = Codec(
    dict(
        enumerate(
            (
                *(m.News, m.Beat, m.Ready, m.Probed, m.PoolNews, m.Leaving, m.Left),
                *(m.Shared, m.CacheNews, m.CacheSnapshot, m.CostNews, m.Tokens),
            )
        )
    )
)
BETWEEN_PEERS = Codec(
    dict(
        enumerate(
            (
                *(tx.Hello, tx.Offer, tx.Accept, tx.Refuse, tx.Data, tx.Landed, tx.Close, tx.Done, tx.Cancel),
                *(tx.Allocate, tx.Allocated, tx.Free, tx.Renew),
                Refused,
            )
        )
    )
)
