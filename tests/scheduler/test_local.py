"""Continuous batching against a one-at-a-time truth, with one flight in the air, on a device that is a dictionary."""

import dataclasses
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from jmemserve.kvpool import BlockPool
from jmemserve.scheduler.fairness import LEVEL_TOKENS, OUTPUT_COST, FairShare, order
from jmemserve.scheduler.local import LocalScheduler
from jmemserve.scheduler.plan import Plan, StepShape, smallest, step_shapes
from jmemserve.scheduler.sequence import Sequence, State
from jmemserve.types import FinishReason, Request, SamplingParams

BLOCK = 4
STOP = 7


def next_token(prefix: list[int]) -> int:
    """A model: the next token depends on everything before it."""
    return hash((len(prefix), *prefix)) % 23


def truth(prompt: list[int], max_tokens: int) -> tuple[list[int], FinishReason]:
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        token = next_token(prompt + tokens)
        if token == STOP:
            return tokens, FinishReason.STOP
        tokens.append(token)
    return tokens, FinishReason.LENGTH


class Device:
    """Pages as a dictionary of slots; a step writes tokens, then reads each row's whole prefix back from its pages."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.last: list[int] = []

    def launch(self, plan: Plan) -> list[int]:
        lengths = [piece.length for piece in plan.slices]
        assert sum(lengths) <= plan.shape.tokens and len(lengths) <= plan.shape.seqs, (plan.shape, lengths)
        sampled = []
        for piece in plan.slices:
            seq, stop = piece.sequence, piece.start + piece.length
            tokens = seq.tokens[piece.start : stop]
            if piece.promised_row >= 0:
                tokens = [*tokens, self.last[piece.promised_row]]
            assert len(tokens) == piece.length, (tokens, piece)
            assert stop <= len(seq.blocks) * BLOCK and seq.table == [block.index for block in seq.blocks]
            for place, token in enumerate(tokens, piece.start):
                self.slots[seq.table[place // BLOCK] * BLOCK + place % BLOCK] = token
            prefix = [self.slots[seq.table[place // BLOCK] * BLOCK + place % BLOCK] for place in range(stop)]
            sampled.append(next_token(prefix))
        self.last = sampled
        return sampled


def make_seq(
    number: int, prompt: list[int], max_tokens: int, salt: str = "", priority: int = 0, rank: float = 0.0
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    standing: Any = {"arrival": float(number), "priority": priority, "rank": rank}
    request = Request(str(number), tuple(prompt), params, 0, frozenset([STOP]), salt, **standing)
    return Sequence(request, list(prompt))


def shapes_of(max_seqs: int, max_tokens: int) -> tuple[StepShape, ...]:
    return step_shapes(True, True, max_seqs, max_tokens)


@dataclasses.dataclass
class World:
    num_blocks: int
    max_seqs: int
    max_tokens: int

    def __post_init__(self) -> None:
        self.pool = BlockPool("a", 1, self.num_blocks, BLOCK)
        self.scheduler = LocalScheduler(self.pool, shapes_of(self.max_seqs, self.max_tokens))
        self.device = Device()
        self.flight: tuple[Plan, list[int]] | None = None
        self.out: dict[str, list[int]] = {}
        self.ends: dict[str, FinishReason] = {}

    def step(self) -> None:
        plan = self.scheduler.plan(0.0)
        following = (plan, self.device.launch(plan)) if plan else None
        if self.flight:
            column = self.scheduler.commit_repeated(*self.flight, 1.0)
            if column is not None:
                for event in column.events:
                    own = self.out.setdefault(event.request_id, [])
                    assert event.start == len(own), "every token in its place"
                    own += event.tokens
            else:
                for seq, token, finish in self.scheduler.commit(*self.flight, 1.0):
                    if token >= 0:
                        self.out.setdefault(seq.request.id, []).append(token)
                    if finish:
                        self.ends[seq.request.id] = finish
        self.flight = following
        self.pool.check()
        for seq in self.scheduler.sequences():
            assert 0 <= seq.computed <= seq.known, (seq.computed, seq.known)
            assert seq.computed <= len(seq.blocks) * BLOCK

    @property
    def busy(self) -> bool:
        return bool(self.flight or self.scheduler.running or self.scheduler.waiting)


requests = st.lists(
    st.tuples(
        st.sampled_from([0, 4, 11]),  # tokens of a prefix that all share
        st.lists(st.integers(0, 22), min_size=1, max_size=17),
        st.integers(1, 12),
        st.integers(0, 6),  # steps before it comes
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(11, 30), st.integers(1, 5), st.integers(6, 24))
def test_every_request_gets_what_it_would_get_alone(reqs, num_blocks: int, max_seqs: int, max_tokens: int) -> None:
    world = World(num_blocks, max_seqs, max(max_tokens, max_seqs + 1))
    shared = list(range(11))
    for number, (prefix, own, limit, delay) in enumerate(reqs):
        for _ in range(delay):
            world.step()
        world.scheduler.submit(make_seq(number, shared[:prefix] + own, limit))
    for _ in range(2000):
        if not world.busy:
            break
        world.step()
    assert not world.busy, "somebody starves"
    for number, (prefix, own, limit, _) in enumerate(reqs):
        tokens, finish = truth(shared[:prefix] + own, limit)
        assert world.out.get(str(number), []) == tokens
        assert world.ends[str(number)] is finish
    assert world.pool.held == 0, world.pool


@settings(max_examples=60, deadline=None)
@given(requests, st.data())
def test_an_abort_at_any_moment_gives_everything_back(reqs, data: st.DataObject) -> None:
    world = World(14, 3, 9)
    seqs = [make_seq(n, list(range(11))[:prefix] + own, limit) for n, (prefix, own, limit, _) in enumerate(reqs)]
    for seq in seqs:
        world.scheduler.submit(seq)
    for _ in range(60):
        world.step()
        if data.draw(st.booleans()):
            alive = [seq for seq in seqs if seq.state is not State.FINISHED]
            if alive:
                world.scheduler.finish(data.draw(st.sampled_from(alive)))
                world.pool.check()
    for seq in seqs:
        if seq.state is not State.FINISHED:
            world.scheduler.finish(seq)
    world.step()
    assert world.pool.held == 0, world.pool


def test_a_second_request_computes_only_what_is_new() -> None:
    world = World(30, 2, 16)
    world.scheduler.submit(make_seq(0, list(range(13)), 2))
    while world.busy:
        world.step()
    again = make_seq(1, list(range(13)), 2)
    world.scheduler.submit(again)
    plan = world.scheduler.plan(0.0)
    assert plan is not None and plan.slices[0].length == 1 and again.cached_tokens == 12


def test_salts_share_nothing() -> None:
    world = World(30, 2, 16)
    world.scheduler.submit(make_seq(0, list(range(13)), 2, "a"))
    while world.busy:
        world.step()
    other = make_seq(1, list(range(13)), 2, "b")
    world.scheduler.submit(other)
    world.step()
    assert other.cached_tokens == 0


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    world = World(100, 4, 8)
    world.scheduler.submit(make_seq(0, [1, 2], 40))
    world.step()
    world.scheduler.submit(make_seq(1, list(range(20)) * 3, 2))
    for _ in range(5):
        plan = world.scheduler.plan(0.0)
        assert plan is not None and {piece.length for piece in plan.slices} == {1, 7}, plan
        sampled = world.device.launch(plan)
        if world.flight:
            world.scheduler.commit(*world.flight, 0.0)
        world.flight = (plan, sampled)


def test_padding_is_avoided_where_two_steps_cost_less() -> None:
    pool = BlockPool("a", 1, 400, BLOCK)
    scheduler = LocalScheduler(pool, shapes_of(4, 1024))
    scheduler.submit(make_seq(0, [1] * 520, 3))
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    assert first is not None and second is not None
    assert [(p.shape.tokens, p.slices[0].length) for p in (first, second)] == [(512, 512), (16, 8)]
    assert not first.slices[0].samples and second.slices[0].samples
    scheduler = LocalScheduler(BlockPool("a", 1, 400, BLOCK), shapes_of(4, 1024))
    scheduler.submit(make_seq(0, [1] * 900, 3))
    whole = scheduler.plan(0.0)
    assert whole is not None and whole.slices[0].length == 900


def test_shapes() -> None:
    both = shapes_of(16, 512)
    assert StepShape(1, 1) in both and StepShape(16, 16) in both and StepShape(512, 16) in both
    assert len(both) <= 12
    assert smallest(both, [1, 1, 1]) == StepShape(4, 4)
    assert smallest(both, [2]) == StepShape(64, 16)
    assert smallest(both, [600]) is None
    only_decode = step_shapes(True, False, 8, 512)
    assert [shape for shape in only_decode if shape.tokens != shape.seqs] == [StepShape(64, 8)]
    only_prefill = step_shapes(False, True, 8, 512)
    assert smallest(only_prefill, [1] * 8) is not None


def endless(number: int, priority: int = 0, rank: float = 0.0) -> Sequence:
    """Never stops by itself, and shares no prefix with others."""
    seq = make_seq(number, [number % 23] * 4, 30, salt=str(number), priority=priority, rank=rank)
    seq.request = dataclasses.replace(seq.request, stop_ids=frozenset())
    return seq


def test_the_waiting_line_is_by_rank_and_priority_then_by_arrival() -> None:
    world = World(30, 1, 16)
    seqs = [endless(0), endless(1), endless(2, rank=50.0), endless(3, priority=1, rank=60.0), endless(4, rank=20.0)]
    for seq in seqs:
        world.scheduler.submit(seq)
    assert [seq.request.id for seq in world.scheduler.waiting] == ["3", "0", "1", "4", "2"]
    world.step()
    assert [seq.request.id for seq in world.scheduler.running] == ["3"]
    world.scheduler.submit(endless(5, priority=100))
    world.step()  # nobody gives way only so that another goes first
    assert [seq.request.id for seq in world.scheduler.running] == ["3"] and not world.scheduler.preemptions


def test_the_last_in_order_gives_way_for_want_of_blocks() -> None:
    world = World(11, 3, 16)
    low, high = endless(0), endless(1, priority=1)
    world.scheduler.submit(low)
    world.step()
    world.scheduler.submit(high)
    while not world.scheduler.preemptions:
        world.step()
    assert low.state is State.WAITING and high.state is State.RUNNING
    world.scheduler.submit(endless(2))
    while world.busy:
        world.step()
        ended = list(world.ends)
    assert ended == ["1", "0", "2"]


def test_a_low_priority_is_reached_although_higher_ones_never_end_to_come() -> None:
    world, shares = World(30, 1, 16), FairShare()
    low = endless(0, priority=-1)
    low.request = dataclasses.replace(low.request, tenant="one")
    shares.enter(low.request)
    world.scheduler.submit(low)
    for number in range(1, 2000):
        seq = endless(number)
        seq.request = dataclasses.replace(seq.request, tenant="one")
        seq.request = dataclasses.replace(seq.request, rank=shares.enter(seq.request))
        world.scheduler.submit(seq)
        ended = len(world.ends)
        while len(world.ends) == ended:
            world.step()
        for request_id in list(world.ends)[ended:]:
            shares.begin(request_id)
            shares.leave(request_id, 30)
        if "0" in world.ends:
            break
    assert 1 < len(world.ends) <= 2 + LEVEL_TOKENS / (4 + OUTPUT_COST * 30)


@settings(max_examples=100, deadline=None)
@given(
    requests, st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 3)), min_size=9, max_size=9), st.integers(11, 20)
)
def test_whatever_the_order_everybody_gets_what_he_would_get_alone(reqs, standings, num_blocks: int) -> None:
    world = World(num_blocks, 3, 9)
    for number, ((prefix, own, limit, delay), (priority, rank)) in enumerate(zip(reqs, standings, strict=False)):
        for _ in range(delay):
            world.step()
        prompt = list(range(11))[:prefix] + own
        world.scheduler.submit(make_seq(number, prompt, limit, priority=priority, rank=4096.0 * rank))
        for line in (list(world.scheduler.waiting), world.scheduler.running):
            assert line == sorted(line, key=lambda seq: order(seq.request))
    for _ in range(2000):
        if not world.busy:
            break
        world.step()
    assert not world.busy, "somebody starves"
    for number, (prefix, own, limit, _) in enumerate(reqs):
        tokens, finish = truth(list(range(11))[:prefix] + own, limit)
        assert world.out.get(str(number), []) == tokens and world.ends[str(number)] is finish


def test_steady_steps_are_those_planned_one_by_one() -> None:
    """The same rows, tokens and blocks, also when somebody comes, ends by a stop token, or gives up its blocks."""

    def run(steady: bool) -> tuple[list[tuple], dict[str, list[int]], int]:
        world, plans, repeats = World(26, 4, 24), list[tuple](), 0
        arrivals = {0: (1, 30), 1: (2, 60), 2: (3, 33), 40: (4, 20), 41: (5, 50)}
        for turn in range(200):
            if turn in arrivals:
                number, length = arrivals[turn]
                world.scheduler.submit(make_seq(number, [number] * (5 + number), length))
            if not steady:
                world.scheduler.reconsider()
            world.step()
            if world.flight is not None:
                plan = world.flight[0]
                repeats += plan.repeats > 0
                rows = [(p.sequence.request.id, p.start, p.length, p.samples, p.promised_row) for p in plan.slices]
                plans.append((plan.number, plan.shape, rows, [tuple(p.sequence.table) for p in plan.slices]))
        assert not world.busy
        return plans, world.out, repeats

    plans, out, repeats = run(steady=True)
    again, truth_out, none = run(steady=False)
    assert plans == again and out == truth_out
    assert repeats > len(plans) // 3 and none == 0


def test_who_is_asked_to_move_is_planned_anew() -> None:
    world = World(40, 4, 24)
    seq = make_seq(1, [1, 2, 3], 40)
    world.scheduler.submit(seq)
    for _ in range(5):
        world.step()
    assert world.flight is not None and world.flight[0].repeats > 0
    world.scheduler.leaves = lambda one: one.moving
    seq.moving = True
    world.scheduler.reconsider()
    world.step()
    assert seq.state is State.LEAVING


def test_who_is_given_up_while_it_decodes_leaves_all_its_full_blocks() -> None:
    """While steps repeat, blocks are offered to the index a few at a time; none is forgotten in the end."""
    world = World(60, 2, 16)
    world.device.launch = lambda plan: [17] * plan.num_rows  # type: ignore[method-assign]
    seqs = [make_seq(number, [number, 1, 2], 60) for number in (7, 9)]
    for seq in seqs:
        world.scheduler.submit(seq)
    for _ in range(30):
        world.step()
    late = seqs[0]
    full = min(late.landed, len(late.tokens)) // BLOCK
    assert late.indexed < full, "else nothing is tested"
    tokens = list(late.tokens)
    world.scheduler.finish(late)
    assert world.pool.peek_media([*tokens[: full * BLOCK], 0])[0] == full
    world.pool.check()
