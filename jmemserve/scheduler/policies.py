"""How to choose an instance: pure functions from a view to a name, found by name in ``POLICIES``."""

import dataclasses
from collections.abc import Callable

# What a running sequence costs a newcomer, in tokens of work: it takes its share of every step to come.
RUNNING_TOKENS = 64.0


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """One instance that may be chosen, as the router believes it to be."""

    name: str
    cached: int  # tokens of the prompt that it holds
    uncached: int  # the others
    pending: int  # tokens of other requests that it has yet to compute before their first token
    running: int  # requests that it works on


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """What a policy sees. There is at least one candidate; their order is that of the cluster's instances."""

    candidates: tuple[Candidate, ...]
    turn: int  # how many requests were routed before
    token_cost: float  # of one uncached token: 1 where it is computed, less where it is only moved


Policy = Callable[[View], str]


def load(candidate: Candidate) -> float:
    """The work before a newcomer, in tokens."""
    return candidate.pending + RUNNING_TOKENS * candidate.running


def longest_prefix(view: View) -> str:
    """The least work until the first token: what waits already and what the cache lacks.

    With equal loads this is the longest cached prefix; a busy instance loses requests that it would serve later than
    an idle one without the prefix. Ties go to the least load, then to the first.
    """
    return min(view.candidates, key=lambda c: (load(c) + view.token_cost * c.uncached, load(c))).name


def least_load(view: View) -> str:
    """The least work waiting, whatever is cached; ties go to the first."""
    return min(view.candidates, key=load).name


def round_robin(view: View) -> str:
    """One after the other."""
    return view.candidates[view.turn % len(view.candidates)].name


POLICIES: dict[str, Policy] = {
    "longest_prefix": longest_prefix,
    "least_load": least_load,
    "round_robin": round_robin,
}
