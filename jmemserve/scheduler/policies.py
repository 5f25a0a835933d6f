"""How to choose instances: pure functions from a request and a view of the cluster to a route, found by name."""

from collections.abc import Callable, Sequence

from jmemserve.scheduler.cost_routing import Ways, cost, first_token_s
from jmemserve.scheduler.view import Asked, Candidate, Load, Route, View

# What a running sequence costs a newcomer, in tokens of work: it takes its share of every step to come.
RUNNING_TOKENS = 64.0
# An instance with so much more work than the least busy one loses its affinity: both must be exceeded.
FAR_ABOVE_TOKENS = 4096.0
FAR_ABOVE_RATIO = 1.5

Policy = Callable[[Asked, View], Route]


def work(load: Load) -> float:
    """The work before a newcomer, in tokens."""
    return load.pending + RUNNING_TOKENS * load.busy


def round_robin(asked: Asked, view: View) -> Route:
    """One after the other."""
    prefill = view.prefill[view.turn % len(view.prefill)]
    decode = prefill if prefill.role.decodes else view.decode[view.turn % len(view.decode)]
    return _route(asked, view, prefill, decode)


def least_load(asked: Asked, view: View) -> Route:
    """The least work waiting, whatever is cached; ties go to the first."""
    prefill = _least(view.prefill)
    return _route(asked, view, prefill, prefill if prefill.role.decodes else _least(view.decode))


def session(asked: Asked, view: View) -> Route:
    """Where the session's last request was; the least load for a new one (paper table 6)."""
    there = {candidate.name: candidate for candidate in (*view.prefill, *view.decode)}
    home = [there.get(name) for name in asked.home or ()]
    if len(home) < 2 or home[0] is None or home[1] is None:
        return least_load(asked, view)
    return _route(asked, view, home[0], home[1])


def longest_prefix(asked: Asked, view: View) -> Route:
    """Who holds most of the prompt (paper section 6); ties go to the least load, then to the first.

    Affinity ends where it would make a hot spot: an instance far above the least busy one is not asked.
    """
    prefill = _longest(view, view.prefill)
    return _route(asked, view, prefill, prefill if prefill.role.decodes else _longest(view, view.decode))


def _longest(view: View, candidates: Sequence[Candidate]) -> Candidate:
    least = min(work(candidate.load) for candidate in candidates)
    limit = max(least * FAR_ABOVE_RATIO, least + FAR_ABOVE_TOKENS)
    near = [candidate for candidate in candidates if work(candidate.load) <= limit]
    return min(near, key=lambda c: (-view.cached(c), work(c.load)))


def _least(candidates: Sequence[Candidate]) -> Candidate:
    return min(candidates, key=lambda candidate: work(candidate.load))


def _route(asked: Asked, view: View, prefill: Candidate, decode: Candidate) -> Route:
    return Route(
        prefill.name,
        decode.name,
        view.cached(prefill),
        predicted_ttft_s=first_token_s(prefill, Ways(asked, view).own(prefill)),
    )


POLICIES: dict[str, Policy] = {
    "cost": cost,
    "longest_prefix": longest_prefix,
    "session": session,
    "least_load": least_load,
    "round_robin": round_robin,
}
