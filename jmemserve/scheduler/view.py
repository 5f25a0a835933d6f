"""What a routing policy sees: the request, and the instances that could have it."""

import dataclasses
from collections.abc import Mapping, Sequence

from jmemserve.config import Role
from jmemserve.scheduler.cost_model import CostModel, Profile
from jmemserve.scheduler.prompt_tree import Holding

# Of an instance whose costs are not known. Only ratios matter: nothing is refused because of it.
UNKNOWN = Profile(
    steps=((1, 1, 0.010), (16, 16, 0.012), (64, 16, 0.016), (256, 16, 0.036), (512, 16, 0.062)),
    pair_s=1e-9,
    context_s=1e-8,
    transfer_call_s=2e-3,
    transfer_block_s=1e-4,
    swap_call_s=1e-3,
    swap_block_s=5e-5,
    about="not measured",
)
NOTHING = Holding(0, 0)


@dataclasses.dataclass(slots=True)
class Load:
    """What an instance has to do, of all that was routed to it in its present life, and for other front-ends."""

    pending: int = 0  # tokens to be computed before a first token
    pending_s: float = 0.0  # the time that this is predicted to take
    sending_s: float = 0.0  # the time that sending prefixes to others is predicted to take
    running: int = 0  # requests
    context: int = 0  # tokens of the requests that decode there
    others: int = 0  # requests of other front-ends, as it said last

    @property
    def busy(self) -> int:
        """Requests of all front-ends."""
        return self.running + self.others


@dataclasses.dataclass(slots=True, eq=False)
class Candidate:
    """One instance that may be chosen, as the router believes it to be. A policy changes nothing in it."""

    name: str
    role: Role
    costs: CostModel  # of its kind
    measured: bool = False  # whether they are known
    pace: float = 1.0  # this one takes so much longer
    load: Load = dataclasses.field(default_factory=Load)
    slots: int = 1 << 20  # sequences that it can run at once


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """The request, as far as it matters here."""

    tokens: int  # of the prompt
    output: float  # tokens that are expected to be generated
    home: tuple[str, str] | None = None  # where the last request of its session was prefilled and decoded


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """The cluster at one moment. There is at least one instance for each part; one may be in both.

    ``held``: what each instance holds of the prompt, or will hold before a newcomer's turn; those with nothing are
    left out.
    """

    prefill: Sequence[Candidate]  # who may compute the prompt, in the cluster's order
    decode: Sequence[Candidate]  # who may go on with it if the prefill instance does not decode
    held: Mapping[str, Holding]
    block_size: int
    turn: int = 0  # how many requests were routed before
    bypass: bool = False  # a prompt may be computed where it will be decoded
    sources: Mapping[str, Holding] = dataclasses.field(default_factory=dict)  # who could send a prefill instance what

    def cached(self, candidate: Candidate) -> int:
        """Tokens of the prompt that an instance holds in any medium."""
        return self.held.get(candidate.name, NOTHING).blocks * self.block_size


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes. A role is a preference: ``decode`` may be a prefill instance that nobody relieves."""

    prefill: str
    decode: str
    predicted_cached_tokens: int = 0  # of the prompt, at the prefill instance when it is this request's turn
    source: str | None = None  # a peer that sends the prefill instance what that lacks of the prompt
    source_blocks: int = 0  # leading blocks that the peer holds
    predicted_ttft_s: float = 0.0  # 0: the instance's costs are not known
