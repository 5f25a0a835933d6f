"""What a front-end and an instance say to each other. Plain values, the same in one process and between machines.

    front-end ──▶ instance    Submit, Abort, Move, Share, Probe, Roster, ChangeRole, ResetCache, AskPool, AskCache,
                              Leave
    instance ──▶ front-end    News, Tokens, Shared, CacheNews, CacheSnapshot, CostNews, Beat, Ready, Probed, PoolNews,
                              Leaving, Left

Times in them are those of the receiver's monotonic clock: a link between machines shifts them (``shifted``).
"""

import dataclasses
import enum

from jmemserve.config import Role
from jmemserve.kvpool.events import Removed, Snapshot, Stored
from jmemserve.scheduler.cost_model import Profile
from jmemserve.types import Event, FinishReason, InstanceLoad, PoolReport, Request


class MemberState(enum.Enum):
    """Where an instance stands in its cluster."""

    LOADING = "loading"  # it has a name, and loads its model
    JOINING = "joining"  # it is being linked with all others
    READY = "ready"
    DRAINING = "draining"  # finishes what it has, gets nothing new
    LEFT = "left"
    DEAD = "dead"  # it said nothing for too long, or its link or thread ended: what it had is lost


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """One instance as the others see it."""

    name: str
    epoch: int  # higher in every life
    role: Role
    state: MemberState
    address: str  # where its peers reach it; empty while it loads


@dataclasses.dataclass(frozen=True, slots=True)
class Submit:
    """Start a request here, or go on with it; ``decode`` is the instance that the router chose to decode it."""

    request: Request
    decode: str
    generated: tuple[int, ...] = ()  # tokens that the client has already
    first_token: float = 0.0  # when the first of them came; 0: not yet


@dataclasses.dataclass(frozen=True, slots=True)
class Abort:
    """End a request in whatever state it is. An unknown id is remembered: the sequence may be on its way here."""

    request_id: str
    reason: FinishReason


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """Let a request go on at ``to``, as soon as all that is known of it is computed here."""

    request_id: str
    to: str


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """Send ``to`` what it lacks of the cached prefix of these tokens, and say ``Shared`` when that is over."""

    request_id: str
    tokens: tuple[int, ...]
    salt: str
    to: str


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """Move a block to a peer to see whether that works, and report with ``Probed``."""

    peer: str
    thorough: bool = False  # pieces of every size, so that all is compiled that is ever needed for them


@dataclasses.dataclass(frozen=True, slots=True)
class Roster:
    """All instances of the cluster, but those that have left or died: link with the new, forget the others."""

    version: int
    members: tuple[Member, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ChangeRole:
    """Prefer something else from now on; what is cached stays."""

    role: Role


@dataclasses.dataclass(frozen=True, slots=True)
class ResetCache:
    """Forget every cached prefix."""


@dataclasses.dataclass(frozen=True, slots=True)
class AskPool:
    """Report on the pool, with ``PoolNews``, to the front-end of this name."""

    frontend: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class AskCache:
    """Send all that is cached, with ``CacheSnapshot``, to the front-end of this name."""

    frontend: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Leave:
    """Finish what still moves to others, then say ``Left``."""


@dataclasses.dataclass(frozen=True, slots=True)
class News:
    """What happened to requests in one step."""

    events: tuple[Event, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """One token each for requests that go on: the news of most steps, in columns, which cost an instance least."""

    request_ids: tuple[str, ...]  # the same object from step to step, while the same requests decode
    starts: tuple[int, ...]  # likewise: places in the outputs, ``step`` tokens ago
    step: int
    tokens: tuple[int, ...]

    @property
    def events(self) -> list[Event]:
        """The same in rows."""
        rows = zip(self.request_ids, self.starts, self.tokens, strict=True)
        return [Event(request_id, (token,), start=start + self.step) for request_id, start, token in rows]

    def of(self, rows: list[int]) -> "Tokens":
        """Some of the rows."""
        columns = (tuple([column[row] for row in rows]) for column in (self.request_ids, self.starts, self.tokens))
        request_ids, starts, tokens = columns
        return Tokens(request_ids, starts, self.step, tokens)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, slots=True)
class Shared:
    """A Share is over; the receiver has what it could get."""

    request_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class CacheNews:
    """What became cached and what was forgotten; all of them together have numbers without gaps."""

    stored: tuple[Stored, ...]
    removed: tuple[Removed, ...]

    @property
    def events(self) -> list[Stored | Removed]:
        """All of them in order."""
        return sorted((*self.stored, *self.removed), key=lambda event: event.number)


@dataclasses.dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """A part of all that is cached; the parts follow each other, and later CacheNews continue them."""

    snapshot: Snapshot
    first: bool
    last: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Beat:
    """I am alive."""

    load: InstanceLoad
    stalled_s: float = 0.0  # since the instance's thread last came round
    others: int = 0  # requests there of other front-ends than the one that is told
    rank: float = 0.0  # the highest of a request that has begun there, whosever it is


@dataclasses.dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded and peers can link up. ``facts`` must be those of all others, or blocks cannot be shared."""

    address: str
    facts: tuple[tuple[str, str], ...]
    max_model_len: int
    profile: Profile | None = None  # what work costs there, if it was measured


@dataclasses.dataclass(frozen=True, slots=True)
class CostNews:
    """Work costs something else than was said before."""

    profile: Profile


@dataclasses.dataclass(frozen=True, slots=True)
class Probed:
    """How a Probe went; no error: it worked."""

    peer: str
    error: str
    way: str = ""  # the transport by which the peer gets blocks of the one that reports


@dataclasses.dataclass(frozen=True, slots=True)
class PoolNews:
    """The answer to AskPool."""

    report: PoolReport


@dataclasses.dataclass(frozen=True, slots=True)
class Leaving:
    """Drain me: I am to end."""


@dataclasses.dataclass(frozen=True, slots=True)
class Left:
    """Nothing is left here that anybody waits for."""


ToInstance = Submit | Abort | Move | Share | Probe | Roster | ChangeRole | ResetCache | AskPool | AskCache | Leave
FromInstance = (
    News | Tokens | Shared | CacheNews | CacheSnapshot | CostNews | Beat | Ready | Probed | PoolNews | Leaving | Left
)


def attempt_id(frontend: str, request: int, attempt: int) -> str:
    """What an instance knows an attempt at a request by. Those of two front-ends are never the same.

    ``frontend``: its name, which holds for one life of it; empty for the only one of a process.
    """
    return f"{frontend}/r{request}.{attempt}" if frontend else f"r{request}.{attempt}"


def frontend_of(attempt: str) -> str:
    """The front-end that waits for the answer."""
    return attempt.rpartition("/")[0]


def shifted[M](message: M, by: float) -> M:
    """The same message with its times on another clock, which shows ``by`` seconds more."""
    if not isinstance(message, Submit):
        return message
    request = message.request
    moved = dataclasses.replace(
        request,
        arrival=request.arrival + by,
        deadline=None if request.deadline is None else request.deadline + by,
    )
    first = message.first_token + by if message.first_token else 0.0
    return dataclasses.replace(message, request=moved, first_token=first)
