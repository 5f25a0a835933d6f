"""The words of jmemserve, and the values that cross its borders.

block       C consecutive tokens' keys and values of all layers; an address names it (``kvpool.address``)
known       tokens a sequence consists of: the prompt, what was generated, and at most one promised token
promised    a token that is sampled on the device but not yet seen by the host
computed    known tokens whose keys and values are in blocks
gap         known - computed: what the next steps must catch up with; prefill and decode differ only in its size
held        a block with at least one reference; *cached*: in the index, unheld; *free*: neither
leave       a sequence moves to another instance; *adopt*: it arrives there
TTFT        seconds from arrival to the first token; TPOT: seconds per token after the first; JCT: arrival to the end
"""

import dataclasses
import enum
import math

from jmemserve.errors import InvalidRequest

INVALID = -1  # a missing index, everywhere
MAX_LOGPROBS = 20  # how many alternatives per token a request may ask for
MAX_STOP_IDS = 32  # how many stop token ids (with the model's own) one request may have
MAX_STOP_STRINGS = 16
MAX_N = 64
MAX_NAME = 256  # characters of a session, of a tenant and of a cache salt
MAX_PRIORITY = 100  # and as much below 0


class FinishReason(enum.Enum):
    """Why an output ended."""

    STOP = "stop"  # end-of-sequence token, a stop token id or a stop string
    LENGTH = "length"  # max_tokens or the model's context is used up
    ABORT = "abort"  # cancelled by the client or by Abort
    DEADLINE = "deadline"  # the client's deadline passed
    ERROR = "error"  # the request failed; ``Event.error`` says why


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens and when to stop. Names and meanings are vLLM's.

    ``check()`` raises InvalidRequest; nothing else looks at the values before they are used.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 or -1: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: the server draws one
    max_tokens: int | None = None  # None: until the model stops or its context is full
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; 0: of the chosen token only; k: and of the k likeliest
    n: int = 1
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # one stop string, as in vLLM
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    def check(self) -> None:
        """Raise InvalidRequest, naming the field and what it may be, if any value can never work."""
        self._check_types()
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 100.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise InvalidRequest(f"{name} must be a number from {low:g} to {high:g}, not {value}")
        if self.top_p == 0:
            raise InvalidRequest("top_p must be above 0; use temperature 0 for greedy decoding")
        if not -1 <= self.top_k < 2**31:
            raise InvalidRequest(f"top_k must be -1 or 0 (off) or a count below 2**31, not {self.top_k}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InvalidRequest(f"seed must be from 0 to 2**63 - 1, not {self.seed}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise InvalidRequest(f"min_tokens must be from 0 to max_tokens ({self.max_tokens}), not {self.min_tokens}")
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise InvalidRequest(f"stop takes at most {MAX_STOP_STRINGS} strings, none of them empty")
        if len(self.stop_token_ids) > MAX_STOP_IDS // 2:
            raise InvalidRequest(
                f"stop_token_ids takes at most {MAX_STOP_IDS // 2} ids, not {len(self.stop_token_ids)}"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InvalidRequest(f"logprobs must be from 0 to {MAX_LOGPROBS}, not {self.logprobs}")
        if not 1 <= self.n <= MAX_N:
            raise InvalidRequest(f"n must be from 1 to {MAX_N}, not {self.n}")

    def _check_types(self) -> None:
        """Callers in Python can put anything anywhere."""
        wholes = ("top_k", "min_tokens", "n", "seed", "max_tokens", "logprobs")
        for name in wholes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | None):
                raise InvalidRequest(f"{name} must be a whole number, not {value!r}")
        if None in (self.top_k, self.min_tokens, self.n):
            raise InvalidRequest("top_k, min_tokens and n must be whole numbers, not None")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InvalidRequest(f"{name} must be a number, not {value!r}")
        if not all(isinstance(text, str) for text in self.stop):
            raise InvalidRequest(f"stop must be texts, not {self.stop!r}")
        if any(isinstance(token, bool) or not isinstance(token, int) for token in self.stop_token_ids):
            raise InvalidRequest(f"stop_token_ids must be whole numbers, not {self.stop_token_ids!r}")


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One output wanted by a client. A call with n > 1 becomes n requests that differ in id and seed."""

    id: str  # unique among the requests in flight
    prompt: tuple[int, ...]  # token ids, at least one
    params: SamplingParams
    seed: int  # resolved: the token at position p depends on (seed, p) and the text before it, on nothing else
    stop_ids: frozenset[int] = frozenset()  # eos ids (unless ignored) and the client's; they end the sequence
    salt: str = ""  # prefix cache entries are shared only between requests of the same salt
    arrival: float = 0.0  # seconds on the server's monotonic clock
    deadline: float | None = None  # same clock; None: no deadline
    follows: str = ""  # id of the first output of the same call: a later output is part of work accepted before
    session: str = ""  # requests of one session are best served by the same instance; a hint
    tenant: str = ""  # who asks, for fair share; empty: the salt stands for it
    priority: int = 0  # higher goes first
    rank: float = 0.0  # place in the fair order of all requests, in tokens; set by the gateway, lower goes first


def check_text(name: str, text: str) -> None:
    """Raise InvalidRequest if a text has half of a character, which nothing can send."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name} is no valid Unicode at character {error.start}: a surrogate alone") from None


def check_standing(session: str, tenant: str, priority: int, salt: str = "") -> None:
    """Raise InvalidRequest, naming the field, if these cannot be those of a request."""
    for name, value in (("session", session), ("tenant", tenant), ("cache_salt", salt)):
        if not isinstance(value, str) or len(value) > MAX_NAME:
            shown = f"{len(value)}" if isinstance(value, str) else repr(value)
            raise InvalidRequest(f"{name} must be a text of at most {MAX_NAME} characters, not {shown}")
        check_text(name, value)
    if isinstance(priority, bool) or not isinstance(priority, int) or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequest(
            f"priority must be a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}, not {priority!r}"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities of one sampled token (of the model's own distribution, before penalties)."""

    token: int
    logprob: float
    rank: int  # 1 is the likeliest
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), likeliest first, as many as were asked for


@dataclasses.dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went, in seconds."""

    queue_s: float = 0.0  # arrival to first being planned
    prefill_s: float = 0.0  # first planned to first token
    transfer_s: float = 0.0  # handing the sequence to a decode instance
    first_token_s: float = 0.0  # arrival to first token
    decode_s: float = 0.0  # first token to last token


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost, in tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens whose keys and values were found in a prefix cache


@dataclasses.dataclass(slots=True)
class Event:
    """News of one request: tokens, or its end. All that a front-end ever sees of an instance.

    A value that nobody changes; it is not frozen since one is made per token, and that makes it three times as quick.
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token if asked for, else empty
    finish: FinishReason | None = None  # set on exactly one event, the last
    usage: Usage = Usage()  # final on the last event
    timings: Timings = Timings()  # final on the last event
    error: str = ""  # for FinishReason.ERROR
    start: int = 0  # place of the first of ``tokens`` in the output: how many came before


@dataclasses.dataclass(frozen=True, slots=True)
class HostTimes:
    """What the host does per step, as medians of the last ones in seconds; 0: nothing was measured."""

    plan_s: float = 0.0  # deciding what it computes
    arrays_s: float = 0.0  # making the numbers that the device needs
    dispatch_s: float = 0.0  # enqueuing its programs
    commit_s: float = 0.0  # taking in its tokens
    gap_s: float = 0.0  # from a result on the host to the launch of the step after the one in the air
    starved: int = 0  # steps since the start that were launched when the device had already ended the one before


@dataclasses.dataclass(frozen=True, slots=True)
class InstanceLoad:
    """A momentary view of one instance, cheap enough to take every second."""

    instance: str
    role: str  # prefill, decode or colocated
    running: int  # sequences with blocks
    waiting: int  # sequences without
    leaving: int  # sequences on their way to another instance
    free_blocks: int
    cached_blocks: int
    held_blocks: int
    total_blocks: int
    prefix_hits: int  # prompt tokens found in the cache since start
    prefix_queries: int  # prompt tokens looked up since start
    steps: int
    preemptions: int
    compiles_after_warmup: int
    cost_error: float = 0.0  # mean of |predicted - measured| / measured over the last steps; 0: nothing was predicted
    host: HostTimes = HostTimes()


@dataclasses.dataclass(frozen=True, slots=True)
class MediumReport:
    """One medium of a pool, in blocks."""

    medium: str  # HBM or DRAM
    capacity: int = 0
    free: int = 0
    held: int = 0
    cached: int = 0
    bytes: int = 0  # of all blocks together


@dataclasses.dataclass(frozen=True, slots=True)
class PoolReport:
    """Everything about one instance's pool that a person may want to see; counts are since the start."""

    instance: str
    media: tuple[MediumReport, ...] = ()
    query_tokens: int = 0  # looked up
    hit_tokens: int = 0  # found
    dram_hit_tokens: int = 0  # of these, found in DRAM
    evictions: int = 0  # cached copies dropped to make room
    swapped_out: int = 0  # blocks
    swapped_in: int = 0  # blocks
    prefix_blocks: int = 0  # cached now, wherever their copies are
    runs: int = 0  # nodes of the index
    transfers_out: int = 0  # under way
    transfers_in: int = 0  # under way
    transfer_calls: int = 0
    network_calls: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    dropped: int = 0  # messages that were late, doubled or unknown
    corrupt: int = 0  # pieces whose bytes came otherwise than they left
    expired_leases: int = 0  # blocks freed because nobody renewed their lease
    failed_transfers: int = 0
    swaps: int = 0  # orders under way
    last_event: int = 0  # number of the newest event of the cache
    peers: tuple[tuple[str, str], ...] = ()  # (instance, how blocks come from it)
    leases: tuple[tuple[str, int, float], ...] = ()  # (instance, blocks it has here, seconds left)
    oldest: tuple[tuple[float, int], ...] = ()  # least recently used prefixes: (seconds since their last use, blocks)


@dataclasses.dataclass(frozen=True, slots=True)
class MemberReport:
    """One instance in one of its lives, as the cluster sees it."""

    name: str
    role: str
    state: str  # loading, joining, ready, draining, left or dead
    epoch: int
    place: str = ""  # machine and process
    address: str = ""  # where its peers reach it
    since_s: float = 0.0  # in this state
    heard_s: float = 0.0  # since it was last heard of
    reason: str = ""  # why it is dead
    load: InstanceLoad | None = None
    peers: tuple[tuple[str, str], ...] = ()  # (instance, how blocks get there)
    profile: str = ""  # what work costs there, as JSON for the simulator; empty: nothing was measured


@dataclasses.dataclass(frozen=True, slots=True)
class ClusterReport:
    """The cluster; counts are since the start."""

    members: tuple[MemberReport, ...] = ()
    requests: int = 0  # in flight
    retries: int = 0  # continued elsewhere because an instance was lost
    moves: int = 0  # asked to move
    failed: int = 0  # could not be continued
    pulls: int = 0  # a peer was asked to send what the prefill instance lacked
    prompt_tokens: int = 0  # of the requests that ended and said what they found cached
    predicted_tokens: int = 0  # of these, predicted to be cached
    cached_tokens: int = 0  # found cached
    over_tokens: int = 0  # predicted and not found
    under_tokens: int = 0  # found and not predicted
    tree_blocks: int = 0  # prefixes of whole blocks that the router knows to be cached somewhere
    tree_renewals: int = 0  # snapshots that were asked for, since an event was missing or predictions were wrong
