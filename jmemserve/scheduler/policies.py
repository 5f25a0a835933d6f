"""How to choose an instance: pure functions from a view to a name, found by name in ``POLICIES``."""

import dataclasses
from collections.abc import Callable

# What a running sequence costs a newcomer, in tokens of work: it takes its share of every step to come.
RUNNING_TOKENS = 64.0
BYPASS_TOKENS = 256  # a longer uncached part would hold up the sequences that are decoded there
BYPASS_SHARE = 4.0  # so many running sequences make a token at a decode instance cost twice what it costs alone
HANDOVER_TOKENS = 48.0  # what a hand-over costs besides its bytes, in tokens of work


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


def bypasses(prefill: Candidate, decode: Candidate, moved_cost: float) -> bool:
    """Is a short prompt done sooner if it is prefilled where it will be decoded?

    There it lacks perhaps more, and every sequence that runs waits for it; but it neither queues nor travels.
    """
    if decode.uncached > BYPASS_TOKENS:
        return False
    here = decode.pending + decode.uncached * (1 + decode.running / BYPASS_SHARE)
    there = load(prefill) + prefill.uncached + HANDOVER_TOKENS + moved_cost * decode.uncached
    return here < there


POLICIES: dict[str, Policy] = {
    "longest_prefix": longest_prefix,
    "least_load": least_load,
    "round_robin": round_robin,
}
