"""In which order requests are served: a fair share for each tenant, and a head start for priority.

Start-time fair queuing. Every request gets a tag when it is accepted, and lower tags go first:

    start = max(V, finish of the tenant's request before)      finish = start + work / weight

``V`` says how far the service has come. In the textbook it is the tag of what is served at the moment. Here requests
do not begin in the order of their tags, with priorities and several instances, and who jumped the line must not take
everybody along: so V is the highest tag that has begun, but not above the lowest that waits. And with every request
that begins V rises by its work, divided by the weights of all tenants in flight, so that an endless row of new
tenants, each of whom starts at V, cannot keep the others waiting.

So tenants that wait are served in proportion to their weights, whoever sends more; one that comes anew neither owes nor
is owed anything; and the tags of a single tenant are the order in which it asked.

Work is counted in tokens. The prompt's uncached ones count as such. How long the answer will be is not known, and
``max_tokens`` says little, since most clients leave it high: what the tenant's answers were lately is expected, at most
``max_tokens``, and what it was in the end is settled with the tenant's next request.

A level of priority is a head start of LEVEL_TOKENS in that order, not a class of its own: what came earlier is
overtaken, but only by so much work, so nobody starves, and a tenant that gives all its requests the highest priority is
sooner served once and then gets its share as before.

Pure and without a clock. What is kept is bounded: a record per request in flight, and one per tenant that is in flight
or was among the last MAX_IDLE to owe something.
"""

import dataclasses
from collections.abc import Mapping

from jmemserve.types import Request

LEVEL_TOKENS = 8192.0  # of work at weight 1; a level is worth a long prompt, the 100 levels a queue of a hundred
OUTPUT_COST = 2.0  # of a token of output, which takes a row in a step of its own, where tokens of prompts share one
EXPECTED_OUTPUT = 128.0  # tokens, before a tenant has shown what its answers are like
SMOOTHING = 0.2  # weight of the newest answer
MAX_IDLE = 1024  # tenants that are remembered while they have nothing in flight


def order(request: Request) -> tuple[float, float, int, str]:
    """The key of the total order in which requests are served, the first one lowest. It never changes."""
    # Shorter ids first, so that the numbers in them count as numbers.
    return request.rank - LEVEL_TOKENS * request.priority, request.arrival, len(request.id), request.id


def tenant_of(request: Request) -> str:
    """Who asks. A salt may be of any length, and what is kept of it must not be."""
    return request.tenant or request.salt[:256]


@dataclasses.dataclass(slots=True)
class _Tenant:
    weight: float
    start: float = 0.0  # the tag of its newest request
    finish: float = 0.0
    flights: int = 0  # requests
    waiting: int = 0  # of these, without a first token
    output: float = EXPECTED_OUTPUT  # mean tokens of its answers


@dataclasses.dataclass(slots=True)
class _Flight:
    tenant: str
    start: float
    holds: float  # while it waits, V does not pass this; low priority waits of its own free will
    prompt: int  # tokens to be computed
    work: float  # what the tenant was charged


class FairShare:
    """The tags of the requests in flight, by their ids. ``weights``: of the tenants that have not 1."""

    def __init__(self, weights: Mapping[str, float] | None = None):
        self._weights = dict(weights or {})
        assert all(weight > 0 for weight in self._weights.values()), self._weights
        self._virtual = self._highest = 0.0  # V, and the highest tag that has begun
        self._flights: dict[str, _Flight] = {}
        self._waiting: dict[str, _Flight] = {}  # of these, without a first token
        self._active: dict[str, _Tenant] = {}  # who has something in flight
        self._idle: dict[str, _Tenant] = {}

    @property
    def waiting(self) -> int:
        """Requests that have no first token yet."""
        return len(self._waiting)

    def waiting_of(self, tenant: str) -> int:
        """The same of one tenant."""
        found = self._active.get(tenant)
        return 0 if found is None else found.waiting

    @property
    def num_tenants(self) -> int:
        """Tenants that are remembered."""
        return len(self._active) + len(self._idle)

    def enter(self, request: Request, cached: int = 0) -> float:
        """Accept a request, ``cached`` tokens of whose prompt need not be computed; its rank.

        A later output of a call stands where the first one does, as part of what was accepted then, but is paid for.
        """
        assert request.id not in self._flights, f"{request.id} has entered already"
        name, limit = tenant_of(request), request.params.max_tokens
        tenant = self._active.get(name) or self._idle.pop(name, None) or _Tenant(self._weights.get(name, 1.0))
        self._active[name] = tenant
        prompt = max(0, len(request.prompt) - cached)
        work = prompt + OUTPUT_COST * (tenant.output if limit is None else min(tenant.output, limit))
        begin = max(self._virtual, tenant.finish)
        tenant.finish = begin + work / tenant.weight
        # What was expected and did not come is given back by a lower ``finish``, but nobody overtakes himself.
        start = tenant.start = max(begin, tenant.start)
        if (first := self._flights.get(request.follows)) is not None:
            start = first.start
        holds = start + LEVEL_TOKENS * max(0, -request.priority)
        self._flights[request.id] = self._waiting[request.id] = _Flight(name, start, holds, prompt, work)
        tenant.flights += 1
        tenant.waiting += 1
        return start

    def begin(self, request_id: str) -> None:
        """A request has its first token. Unknown ids and repeated calls do nothing."""
        flight = self._waiting.pop(request_id, None)
        if flight is None:
            return
        self._active[flight.tenant].waiting -= 1
        self._highest = max(self._highest, flight.start)
        lowest = min((other.holds for other in self._waiting.values()), default=self._highest)
        progress = flight.work / sum(tenant.weight for tenant in self._active.values())
        self._virtual = max(self._virtual + progress, min(self._highest, lowest))

    def catch_up(self, tag: float) -> None:
        """An instance has begun a request with this tag: above all of ours, it came by another front-end.

        Who shares instances counts the same time, or the requests of the younger one would always go first.
        """
        if tag > self._highest:
            self._highest = tag
            lowest = min((other.holds for other in self._waiting.values()), default=tag)
            self._virtual = max(self._virtual, min(tag, lowest))

    def leave(self, request_id: str, made: int) -> None:
        """A request has ended after ``made`` tokens, in whatever way. Unknown ids do nothing.

        Who got nothing pays nothing.
        """
        flight = self._flights.pop(request_id, None)
        if flight is None:
            return
        tenant, work = self._active[flight.tenant], 0.0
        if self._waiting.pop(request_id, None) is not None:
            tenant.waiting -= 1
        else:
            work = flight.prompt + OUTPUT_COST * made
            tenant.output += SMOOTHING * (made - tenant.output)
        tenant.finish += (work - flight.work) / tenant.weight
        tenant.flights -= 1
        if not tenant.flights:
            self._idle[flight.tenant] = self._active.pop(flight.tenant)
            if len(self._idle) > MAX_IDLE:
                del self._idle[min(self._idle, key=lambda name: self._idle[name].finish)]  # it owes least
        if not self._flights:  # nobody waits, so nobody has been put off: all debts are void
            self._virtual = max(self._virtual, *(other.finish for other in self._idle.values()))
