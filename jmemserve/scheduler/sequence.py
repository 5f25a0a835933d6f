"""A sequence: the tokens of one output, and how far their keys and values are computed."""

import dataclasses
import enum

import numpy as np

from jmemserve.kvpool import BlockAddress
from jmemserve.kvpool.runs import pack
from jmemserve.types import Request, Timings

NO_TOKENS = np.empty(0, np.int32)


class State(enum.Enum):
    """Where a sequence stands in its instance."""

    WAITING = "waiting"  # holds no block
    LOADING = "loading"  # its blocks are on their way from DRAM
    RUNNING = "running"  # holds blocks and is planned
    LEAVING = "leaving"  # holds blocks, is not planned, its blocks are on their way to another instance
    FINISHED = "finished"


@dataclasses.dataclass(slots=True)
class Stamps:
    """When things happened, in seconds on the server's monotonic clock; 0 is not yet."""

    arrival: float = 0.0
    planned: float = 0.0
    first_token: float = 0.0
    left: float = 0.0
    adopted: float = 0.0
    last_token: float = 0.0

    def timings(self) -> Timings:
        """The stamps as durations; what has not happened counts 0."""

        def between(start: float, stop: float) -> float:
            return max(0.0, stop - start) if start and stop else 0.0

        return Timings(
            queue_s=between(self.arrival, self.planned),
            prefill_s=between(self.planned, self.first_token),
            transfer_s=between(self.left, self.adopted),
            first_token_s=between(self.arrival, self.first_token),
            decode_s=between(self.first_token, self.last_token),
        )


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """One output in the making; owned by exactly one instance.

    Invariants: 0 <= computed <= known;  computed <= len(blocks) * block size;  promised is 0 or 1
    whenever a step is planned (2 between planning the next step and learning what the last one sampled).
    """

    request: Request
    tokens: list[int]  # the prompt, then what was generated
    decode_hint: str | None = None  # the instance that the router chose for decoding
    promised: int = 0  # tokens sampled on the device (or about to be), their values not yet seen
    promised_row: int = -1  # row of the newest one in the output of its flight
    computed: int = 0  # tokens whose keys and values are written by steps planned so far
    landed: int = 0  # the same, of steps that are known to have ended
    blocks: list[BlockAddress] = dataclasses.field(default_factory=list)  # in token order, all held
    table: list[int] = dataclasses.field(default_factory=list)  # their page numbers
    indexed: int = 0  # leading blocks that were offered to the token index
    state: State = State.WAITING
    stays: bool = False  # nobody would take it: it decodes here, whatever the role says
    moving: bool = False  # it was asked to go on at ``decode_hint``
    origin: str | None = None  # the instance that prefilled it and wants back what is made here
    turns: int = 0  # raised whenever the blocks are given back, so that an old flight can be told from a new one
    cached_tokens: int = 0  # prompt tokens found in a prefix cache at first admission
    first_admission: bool = True
    stamps: Stamps = dataclasses.field(default_factory=Stamps)
    _packed: np.ndarray = dataclasses.field(default_factory=lambda: NO_TOKENS, repr=False)

    @property
    def packed(self) -> np.ndarray:
        """The tokens as int32, for the pool: a sequence that waits is looked up again and again."""
        have = len(self._packed)
        if have < len(self.tokens):
            new = np.frombuffer(pack(self.tokens[have:], len(self.tokens) - have), np.int32)
            self._packed = np.concatenate((self._packed, new)) if have else new
        return self._packed

    @property
    def known(self) -> int:
        return len(self.tokens) + self.promised

    @property
    def gap(self) -> int:
        return self.known - self.computed

    @property
    def generated(self) -> int:
        """Tokens generated so far, the promised one included."""
        return self.known - len(self.request.prompt)

    @property
    def full(self) -> bool:
        """Nothing more may be generated: ``max_tokens`` is reached once the promise is kept."""
        limit = self.request.params.max_tokens
        assert limit is not None, "max_tokens is resolved when a request is accepted"
        return self.generated >= limit
