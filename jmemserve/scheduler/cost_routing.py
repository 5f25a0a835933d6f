"""The policy ``cost``: the route that adds the fewest seconds to all requests together.

    queue at P ── max ──> keys and values in place ──> prefill of the rest ──> transfer to D ──> decode at D
    pull from a peer ┘         (swap in, or compute)

With only prefill instances to choose from this is the paper's rule (section 5.3.1): the least of
``sum of exec over the unfinished there + exec(x, y)``, where a peer's blocks are fetched if that takes less than
computing them. What the paper leaves open: a source that works answers late, computing again costs more the fewer
instances are idle, and a full decode instance costs what it delays. A pair's cost is the sum of a part for P and one
for D, so the best pair is found without looking at pairs; only instances that could do both are looked at as one.
"""

import dataclasses
import math
from collections.abc import Sequence

from jmemserve.scheduler.view import NOTHING, Asked, Candidate, Route, View

TURNS = 6  # of its loop until an instance has heard of a pull, agreed on it and read: as many steps pass


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """How the keys and values of a prompt get in place at one instance, and what is left to compute there."""

    seconds: float  # until the first token, on an instance that has nothing else to do
    cached: int  # tokens that need not be computed
    fetch_s: float = 0.0  # of these seconds, those that pass beside the work of others
    source: str | None = None
    source_blocks: int = 0


class Ways:
    """The cheapest way at each instance, worked out once per profile and holding: most hold nothing and are alike."""

    def __init__(self, asked: Asked, view: View):
        self._asked, self._view = asked, view
        self._known: dict[tuple[int, int, int], Way] = {}
        # What is computed again keeps an instance from the next request, the more surely the fewer are idle.
        self.crowd = sum(candidate.load.pending > 0 for candidate in view.prefill) / len(view.prefill)
        self.most = max((holding.blocks for holding in view.sources.values()), default=0)
        self.best, self._delay_s = None, math.inf  # who could send so much soonest, and when
        if self.most:
            by_name = {candidate.name: candidate for candidate in (*view.prefill, *view.decode)}
            for name, holding in view.sources.items():
                delay_s = _until_it_sends(by_name[name]) if name in by_name else 0.0
                if holding.blocks == self.most and delay_s < self._delay_s:
                    self.best, self._delay_s = name, delay_s

    def at(self, candidate: Candidate) -> Way:
        holding = self._view.held.get(candidate.name, NOTHING)
        key = id(candidate.costs), holding.blocks, holding.dram
        way = self._known.get(key)
        if way is None:
            way = self._known[key] = self._cheapest(candidate, *holding)
        return way

    def own(self, candidate: Candidate) -> Way:
        """With all that the instance holds itself, and nothing else."""
        costs, size, tokens = candidate.costs, self._view.block_size, self._asked.tokens
        blocks, dram = self._view.held.get(candidate.name, NOTHING)
        swap_s = costs.swap_in_s(dram)
        return Way(swap_s + costs.prefill_s(tokens, blocks * size), blocks * size, swap_s)

    def _cheapest(self, candidate: Candidate, blocks: int, dram: int) -> Way:
        """In HBM: nothing; in DRAM: swap in or compute again; at a peer: pull; else compute."""
        costs, size, tokens = candidate.costs, self._view.block_size, self._asked.tokens
        swap_s = costs.swap_in_s(dram)
        ways = [self.own(candidate)]
        if dram:
            fewer = (blocks - dram) * size
            ways.append(Way(costs.prefill_s(tokens, fewer), fewer))
        if self.most > blocks:
            pull_s = self._delay_s + costs.transfer_s(self.most - blocks) + swap_s
            seconds = pull_s + costs.prefill_s(tokens, self.most * size)
            ways.append(Way(seconds, self.most * size, pull_s, self.best, self.most))
        return min(ways, key=lambda way: way.seconds)


def cost(asked: Asked, view: View) -> Route:
    """The route that adds the fewest seconds; ties go to the first."""
    ways = Ways(asked, view)
    chosen, least = None, math.inf
    decode, decode_s = _decoder(asked, view)
    for candidate in (*view.prefill, *view.decode) if view.bypass else view.prefill:
        alone = candidate.role.decodes or decode is None  # it would go on with what it has computed
        seconds = _prefill_there(ways, candidate) + (decode_there(asked, candidate, 0) if alone else decode_s)
        if seconds < least:
            chosen, least = (candidate, candidate if alone or decode is None else decode), seconds
    assert chosen is not None, f"nobody to choose from: {view}"
    prefill, decode = chosen
    way = ways.at(prefill)
    return Route(prefill.name, decode.name, way.cached, way.source, way.source_blocks, first_token_s(prefill, way))


def first_token_s(candidate: Candidate, way: Way) -> float:
    """How long the first token will take there; 0: the instance's costs are not known."""
    if not candidate.measured:
        return 0.0
    return _wait_s(candidate, way) + candidate.pace * (way.seconds - way.fetch_s)


def decode_there(asked: Asked, candidate: Candidate, lacking_blocks: int) -> float:
    """What decoding at an instance adds: moving what it lacks, the steps, and how much these slow down the others."""
    costs, load, pace = candidate.costs, candidate.load, candidate.pace
    before = pace * costs.decode_step_s(min(load.busy, candidate.slots), load.context)
    running = min(load.busy + 1, candidate.slots)
    step = pace * costs.decode_step_s(running, load.context + asked.tokens)
    seconds = costs.transfer_s(lacking_blocks) + asked.output * (step + load.busy * max(0.0, step - before))
    over = load.busy + 1 - candidate.slots
    if over > 0:  # it waits until so many others have ended
        seconds += over / candidate.slots * asked.output * step
    return seconds


def _decoder(asked: Asked, view: View) -> tuple[Candidate | None, float]:
    """Who decodes a prompt that was computed elsewhere. All blocks travel but those that are there."""
    best, least = None, math.inf
    whole = -(-asked.tokens // view.block_size)
    known: dict[tuple[int, float, int, int, int], float] = {}
    for candidate in view.decode:
        if candidate.role.decodes:
            load, held = candidate.load, view.held.get(candidate.name, NOTHING).blocks
            key = id(candidate.costs), candidate.pace, load.busy, load.context, held
            seconds = known.get(key)
            if seconds is None:
                seconds = known[key] = decode_there(asked, candidate, whole - held)
            if seconds < least:
                best, least = candidate, seconds
    return best, least


def _prefill_there(ways: Ways, candidate: Candidate) -> float:
    """What computing the prompt at an instance adds: until the first token, and what decodes there stands still."""
    way = ways.at(candidate)
    compute_s = candidate.pace * (way.seconds - way.fetch_s)
    stalls = candidate.load.busy if candidate.role.decodes else 0
    return _wait_s(candidate, way) + compute_s * (1 + stalls + ways.crowd)


def _until_it_sends(source: Candidate) -> float:
    """What it was asked to send before goes first, and it answers and reads between steps."""
    costs, load = source.costs, source.load
    if load.pending:
        step = costs.longest_step_s
    elif load.busy:
        step = costs.decode_step_s(min(load.busy, source.slots), load.context)
    else:
        step = 0.0
    return load.sending_s + TURNS * source.pace * step


def _wait_s(candidate: Candidate, way: Way) -> float:
    """What is fetched is fetched while others are computed."""
    return max(candidate.load.pending_s, way.fetch_s)


def best_decoder(asked: Asked, view: View, candidates: Sequence[Candidate]) -> Candidate:
    """Where a sequence goes on that leaves an instance; there is at least one candidate."""
    return min(
        candidates,
        key=lambda c: decode_there(
            asked, c, -(-asked.tokens // view.block_size) - view.held.get(c.name, NOTHING).blocks
        ),
    )
