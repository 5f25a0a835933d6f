"""The requests in flight: where each of them is, what its client has got, and how it goes on when an instance dies.

    submit ──▶ attempt 1 at (P, D) ──▶ news, in order ──▶ finished   (P may get blocks of a peer first: Share)
                   │ P or D is lost
                   ├──▶ attempt 2 elsewhere, from the tokens that the client has ──▶ ...
                   └──▶ parked, while no instance is ready; ended with an error after a time

Every attempt has an id of its own, so what a former one still says (a zombie, a message that was late) is nobody's and
is dropped. News carry their place in the output: two instances reach this by different links, so what comes early waits
and what comes twice is cut off. Since a token depends on the text before it, the seed and its position alone, an
attempt continues the output as if nothing had happened. Who goes first is decided when a request is accepted, by
``fairness``, and holds for all its attempts. Pure: ``now`` is an argument (monotonic seconds).
"""

import dataclasses
import itertools
from collections.abc import Iterable

from jmemserve.config import Role
from jmemserve.errors import DuplicateRequest, Overloaded, Unavailable
from jmemserve.scheduler.admission import Limits, in_line
from jmemserve.scheduler.fairness import FairShare, order, tenant_of
from jmemserve.scheduler.messages import Abort, Beat, Move, Share, Submit, attempt_id
from jmemserve.scheduler.router import InstanceState, Route, Router
from jmemserve.scheduler.ticket import Ticket
from jmemserve.types import ClusterReport, Event, FinishReason, MemberReport, Request, Timings, Usage

PARKED_S = 120.0  # how long a request waits for an instance before it fails
MAX_ATTEMPTS = 6  # in a row without a new token: this request may be what kills the instances
PULL_S = 5.0  # how long a request waits for a peer's blocks before its instance computes them
MOVE_AGAIN_S = 2.0  # a move that failed is asked for again after so long


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """What happened since the start."""

    retries: int = 0  # attempts begun because an instance was lost
    late: int = 0  # news of attempts that are over
    doubled: int = 0  # tokens that had come already
    moves: int = 0  # sequences asked to move
    pulls: int = 0  # requests for which a peer was asked to send blocks
    failed: int = 0  # requests given up


class Gateway:
    """Requests among the router's instances. Messages for instances gather in ``outbox``; methods return events."""

    def __init__(self, router: Router, limits: Limits, frontend: str = ""):
        self.router, self.frontend = router, frontend
        self.outbox: list[tuple[str, Submit | Abort | Move | Share]] = []
        self.counts = Counts()
        self._limits = limits
        self._shares = FairShare(dict(limits.weights))
        self._tickets: dict[str, Ticket] = {}  # by the id of the present attempt
        self._inner: dict[str, str] = {}  # the caller's id -> the id of the present attempt
        self._numbers = itertools.count(1)
        self._draining: set[str] = set()

    def __len__(self) -> int:
        return len(self._tickets)

    def ids(self) -> list[str]:
        """The caller's ids of all requests in flight."""
        return list(self._inner)

    def at(self, instance: str) -> list[str]:
        """The caller's ids of the requests that may be at an instance."""
        return [ticket.outer_id for ticket in self._tickets.values() if instance in ticket.homes]

    # -- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request, now: float, accepted: bool = False, patient: bool = False) -> None:
        """Start a request whose limits are resolved.

        ``accepted``: it is part of work that was accepted before, and no limit refuses it. ``patient``: it may wait for
        an instance, since one is about to come. Raises DuplicateRequest, Overloaded (too many wait for their first
        token, or it would wait too long) or Unavailable (no instance); then nothing is changed.
        """
        if request.id in self._inner:
            raise DuplicateRequest(f"a request with id {request.id!r} is in flight; use another id, or wait for it")
        if not accepted:
            self._limits.check_queue(self._shares.waiting, self._shares.waiting_of(tenant_of(request)))
        number = next(self._numbers)
        inner = attempt_id(self.frontend, number, 1)
        ticket = Ticket(request.id, dataclasses.replace(request, id=inner), number, parked=now)
        route = self._choose(ticket, patient, now)
        rank = self._shares.enter(request, route.predicted_cached_tokens if route is not None else 0)
        ticket.request = dataclasses.replace(ticket.request, rank=rank)
        if route is not None:
            try:
                if not accepted:
                    self._check_delay(ticket, route, now)
            except Overloaded:
                self._shares.leave(request.id, 0)
                self.router.on_finished(inner, ticket.known, now)
                raise
            self._send(ticket, route, now)
        self._tickets[inner] = ticket
        self._inner[request.id] = inner

    def abort(self, request_id: str, reason: FinishReason, now: float) -> list[Event] | None:
        """End a request: its last event follows, at once if no instance has it. None: there is no such request."""
        inner = self._inner.get(request_id)
        if inner is None:
            return None
        ticket = self._tickets[inner]
        if not ticket.homes or ticket.source is not None:
            return [self._end(ticket, reason, now)]
        ticket.ending = reason
        self.outbox += [(home, Abort(inner, reason)) for home in dict.fromkeys(ticket.homes)]
        return []

    def news(self, instance: str, events: Iterable[Event], now: float) -> list[Event]:
        """Take an instance's events; returns what is new, in order, under the caller's ids."""
        out: list[Event] = []
        late = doubled = 0
        unwanted: dict[str, None] = {}  # attempts that are over, but not there: a twin, whose hand-over came unheard
        for event in events:
            ticket = self._tickets.get(event.request_id)
            if ticket is None:
                late += 1
                if event.finish is None:
                    unwanted[event.request_id] = None
                else:
                    unwanted.pop(event.request_id, None)
                continue
            if ticket.goes_on(instance, event):
                ticket.failures = 0
                ticket.generated += event.tokens
                out.append(Event(ticket.outer_id, event.tokens, event.logprobs, start=event.start))
                continue
            doubled += max(0, min(len(ticket.generated) - event.start, len(event.tokens)))
            if event.start not in ticket.early or event.finish is not None:
                ticket.early[event.start] = instance, event
            while (following := ticket.next()) is not None:
                out.append(self._deliver(ticket, *following, now))
        self.outbox += [(instance, Abort(request_id, FinishReason.ABORT)) for request_id in unwanted]
        counts = self.counts
        self.counts = dataclasses.replace(counts, late=counts.late + late, doubled=counts.doubled + doubled)
        return out

    def heard(self, instance: str, beat: Beat) -> None:
        """What other front-ends have at an instance, and how far their service has come there."""
        self.router.set_others(instance, beat.others)
        self._shares.catch_up(beat.rank)

    def shared(self, source: str, attempt: str) -> None:
        """A peer has sent what it could: the request can start. Whatever is over by now is nobody's."""
        ticket = self._tickets.get(attempt)
        if ticket is not None and ticket.source == source:
            self._start(ticket)

    def tick(self, now: float) -> list[Event]:
        """What time demands: parked requests find an instance or end; moves that failed are asked for again."""
        out = []
        for ticket in [ticket for ticket in self._tickets.values() if not ticket.homes]:
            deadline = ticket.request.deadline
            if deadline is not None and now > deadline:
                out.append(self._end(ticket, FinishReason.DEADLINE, now))
            elif now - ticket.parked > PARKED_S:
                out.append(self._fail(ticket, f"no instance was ready for {PARKED_S:g} s", now))
            else:
                self._route(ticket, now)
        for ticket in list(self._tickets.values()):
            if ticket.source is not None and now > ticket.source_until:
                self._start(ticket)
        for instance in sorted(self._draining):
            self._move_all(instance, now)
        return out

    def fail_all(self, sentence: str, now: float) -> list[Event]:
        """End every request with an error."""
        return [self._fail(ticket, sentence, now) for ticket in list(self._tickets.values())]

    # -- instances ----------------------------------------------------------------------------------------------------

    def add(self, instance: str, role: Role, now: float) -> list[Event]:
        """An instance is ready; parked requests go there at once."""
        self.router.add(instance, role)
        self._draining.discard(instance)
        return self.tick(now)

    def lost(self, instance: str, now: float) -> list[Event]:
        """An instance is dead or has left: what it may have had goes on elsewhere."""
        self._draining.discard(instance)
        self.router.remove(instance)
        out = []
        for ticket in self._tickets.values():
            if ticket.source == instance and instance not in ticket.homes:
                self._start(ticket)
        for ticket in [ticket for ticket in self._tickets.values() if instance in ticket.homes]:
            for home in dict.fromkeys(ticket.homes):
                if home != instance:
                    self.outbox.append((home, Abort(ticket.request.id, FinishReason.ABORT)))
            if ticket.ending is not None:
                out.append(self._end(ticket, ticket.ending, now))
                continue
            ticket.failures += 1
            if ticket.failures >= MAX_ATTEMPTS:
                out.append(self._fail(ticket, f"{ticket.failures} instances in a row were lost with it", now))
                continue
            self._retry(ticket, now)
        return out

    def drain(self, instance: str, now: float) -> None:
        """An instance gets nothing new, and what it has goes elsewhere, if there is another."""
        self.router.set_state(instance, InstanceState.DRAINING)
        self._draining.add(instance)
        for ticket in self._tickets.values():
            if instance in ticket.homes:
                ticket.asked = 0.0  # wherever it was asked to go before
        self._move_all(instance, now)

    def move(self, request_id: str, to: str | None, now: float) -> str | None:
        """Ask a request to go on at another instance; which, or None if there is none or no such request."""
        inner = self._inner.get(request_id)
        ticket = self._tickets.get(inner) if inner is not None else None
        if ticket is None or not ticket.homes:
            return None
        target = to or self.router.relief(ticket.known, ticket.request.salt, ticket.homes[-1], now)
        if target is None or target == ticket.homes[-1]:
            return None
        return self._move(ticket, target, now)

    def report(self, members: tuple[MemberReport, ...]) -> ClusterReport:
        """The cluster with these members, for people."""
        counts, found, beliefs = self.counts, self.router.predictions, self.router.beliefs
        return ClusterReport(
            members,
            len(self._tickets),
            counts.retries,
            counts.moves,
            counts.failed,
            counts.pulls,
            found.prompt_tokens,
            found.predicted_tokens,
            found.cached_tokens,
            found.over_tokens,
            found.under_tokens,
            beliefs.tree.num_blocks,
            found.renewals,
        )

    # -- inside -------------------------------------------------------------------------------------------------------

    def _move_all(self, instance: str, now: float) -> None:
        """Ask every sequence of an instance that drains to go elsewhere."""
        for ticket in list(self._tickets.values()):
            if instance not in ticket.homes or ticket.ending is not None or now - ticket.asked < MOVE_AGAIN_S:
                continue
            target = self.router.relief(ticket.known, ticket.request.salt, instance, now)
            if target is not None and target != ticket.homes[0]:
                self._move(ticket, target, now)

    def _move(self, ticket: Ticket, target: str, now: float) -> str:
        """It is at one of its homes, and which is not known here: all are told, and the one that has it obeys.

        A home may come twice: where it is to go it may be now, and leave on an older wish before it comes back.
        """
        ticket.asked = now
        if ticket.source is not None:
            self._start(ticket)  # who is to let it go must have heard of it
        self.router.moved(ticket.request.id, target)
        self.outbox += [(home, Move(ticket.request.id, target)) for home in dict.fromkeys(ticket.homes)]
        if target != ticket.homes[-1]:
            ticket.homes = (*ticket.homes, target)
        self.counts = dataclasses.replace(self.counts, moves=self.counts.moves + 1)
        return target

    def _retry(self, ticket: Ticket, now: float) -> None:
        """The present attempt is over; another begins."""
        old = ticket.request.id
        self.router.on_finished(old, ticket.known, now)
        del self._tickets[old]
        ticket.attempt += 1
        inner = attempt_id(self.frontend, ticket.number, ticket.attempt)
        ticket.request = dataclasses.replace(ticket.request, id=inner)
        ticket.early.clear()
        ticket.homes, ticket.parked, ticket.asked, ticket.source = (), now, 0.0, None
        self._tickets[inner] = ticket
        self._inner[ticket.outer_id] = inner
        self.counts = dataclasses.replace(self.counts, retries=self.counts.retries + 1)
        self._route(ticket, now)

    def _route(self, ticket: Ticket, now: float) -> None:
        """Send the present attempt to an instance, if one is ready."""
        route = self._choose(ticket, True, now)
        if route is not None:
            self._send(ticket, route, now)

    def _choose(self, ticket: Ticket, patient: bool, now: float) -> Route | None:
        """Instances for the present attempt; None: it is parked. Raises Unavailable if it cannot be."""
        try:
            route = self.router.route(ticket.request.id, ticket.known, ticket.request.salt, now, ticket.request.session)
        except Unavailable:
            if patient:
                return None
            raise
        ticket.uncached = len(ticket.known) - route.predicted_cached_tokens
        return route

    def _check_delay(self, ticket: Ticket, route: Route, now: float) -> None:
        """Raise Overloaded if its first token is predicted too late."""
        if not route.predicted_ttft_s or self._limits.max_queue_delay_s is None:
            return
        ahead = behind = 0
        for other in self._tickets.values():
            if not other.generated and other.homes and other.homes[0] == route.prefill:
                if order(other.request) < order(ticket.request):
                    ahead += other.uncached
                else:
                    behind += other.uncached
        deadline = ticket.request.deadline
        left = None if deadline is None else deadline - now
        self._limits.check_delay(in_line(route.predicted_ttft_s, ticket.uncached, ahead, behind), left)

    def _send(self, ticket: Ticket, route: Route, now: float) -> None:
        """The present attempt goes to where it was routed."""
        ticket.homes, ticket.decode = tuple(dict.fromkeys((route.prefill, route.decode))), route.decode
        if route.source is None:
            self._start(ticket)
            return
        ticket.source, ticket.source_until = route.source, now + PULL_S
        share = Share(ticket.request.id, ticket.known, ticket.request.salt, route.prefill)
        self.outbox.append((route.source, share))
        self.counts = dataclasses.replace(self.counts, pulls=self.counts.pulls + 1)

    def _start(self, ticket: Ticket) -> None:
        """The first home hears of the request."""
        ticket.source = None
        message = Submit(ticket.request, ticket.decode, tuple(ticket.generated), ticket.first_token)
        self.outbox.append((ticket.homes[0], message))

    def _deliver(self, ticket: Ticket, instance: str, event: Event, now: float) -> Event:
        inner = ticket.request.id
        if instance in ticket.homes:  # all that came before is delivered, so where it was before does not matter
            ticket.homes = ticket.homes[ticket.homes.index(instance) :]
        if event.tokens:
            ticket.failures = 0
            ticket.generated += event.tokens
            ticket.heard, ticket.first_token = inner, ticket.first_token or now
            self.router.on_first_token(inner, now)
            self._shares.begin(ticket.outer_id)
        if event.finish is not None:
            self._forget(ticket, now, event.usage.cached_tokens)
            ticket.early.clear()
        return dataclasses.replace(event, request_id=ticket.outer_id)

    def _end(self, ticket: Ticket, reason: FinishReason, now: float, error: str = "") -> Event:
        """The last event of a request that no instance speaks for."""
        self._forget(ticket, now)
        arrival, first = ticket.request.arrival, ticket.first_token
        timings = Timings(first_token_s=first - arrival, decode_s=now - first) if first else Timings()
        usage = Usage(len(ticket.request.prompt), len(ticket.generated))
        start = len(ticket.generated)
        return Event(ticket.outer_id, start=start, finish=reason, usage=usage, timings=timings, error=error)

    def _forget(self, ticket: Ticket, now: float, cached: int | None = None) -> None:
        """It has ended; ``cached`` tokens of its prompt were found."""
        self.router.on_finished(ticket.request.id, ticket.known, now, cached)
        self._shares.leave(ticket.outer_id, len(ticket.generated))
        del self._tickets[ticket.request.id], self._inner[ticket.outer_id]

    def _fail(self, ticket: Ticket, sentence: str, now: float) -> Event:
        self.counts = dataclasses.replace(self.counts, failed=self.counts.failed + 1)
        return self._end(ticket, FinishReason.ERROR, now, sentence)
