"""What work costs on one instance, measured once all is compiled and before it has any work.

Compiled steps run on scratch blocks with chosen new tokens and contexts; what is swapped and what is gathered for a
transfer is timed too. The blocks are given back, nothing enters the cache, nothing is compiled. The instance must have
nothing in the air: a step's sampled tokens stay on the device, and these runs write over them.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from jmemserve.config import EngineConfig, Warmup
from jmemserve.engine.build import Parts
from jmemserve.engine.report import Report
from jmemserve.engine.runner import Runner
from jmemserve.kernels import pair_tile
from jmemserve.kvpool import BlockAddress, BlockPool, Medium
from jmemserve.kvpool.store import SpanningStore
from jmemserve.scheduler import fitting
from jmemserve.scheduler.cost_model import CostModel, Profile, work
from jmemserve.scheduler.local import LocalScheduler
from jmemserve.scheduler.plan import Plan, Slice, StepShape
from jmemserve.scheduler.sequence import Sequence as Running
from jmemserve.types import INVALID, Request, SamplingParams

LONG = 2048  # tokens of context at most: enough to tell its cost from that of the rest
ROUNDS = 9  # of a step at most
BYTES_SHARE = 0.15  # of the budget, for swaps and transfers
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1)

Rows = tuple[tuple[int, int], ...]  # (first new token's place, new tokens) of each row


def calibrated(parts: Parts, name: str, engine: EngineConfig, report: Report) -> Parts:
    """The same parts with their profile, measured within ``calibrate_s``; where it cannot be, a line says why.

    Of several processes only the first calls this, once the others repeat what it enqueues.
    """
    if not engine.calibrate_s:
        return parts
    store = parts.runner.store
    if engine.warmup is Warmup.NONE:
        report.line(f"  {name}: costs are not measured, since nothing is compiled yet (--warmup none)")
        return parts
    if isinstance(store, SpanningStore) and not parts.runner.leads:
        report.line(f"  {name}: costs are not measured, since the other processes of the mesh do not follow yet")
        return parts
    with report.phase(f"{name}: measure costs"):
        profile = measure(parts, engine.calibrate_s, name)
    report.line(f"    {describe(profile)}")
    return dataclasses.replace(parts, profile=profile)


def describe(profile: Profile) -> str:
    """A line for people."""
    model, most = CostModel(profile), max(seqs for _, seqs, _ in profile.steps)
    rows = min(8, most)
    return f"prefill of 1,024 tokens {model.prefill_s(1024, 0):.2g} s, decode step at {rows}: " + (
        f"{1e3 * model.decode_step_s(rows, 0):.2g} ms"
    )


def measure(parts: Parts, budget_s: float, about: str = "") -> Profile:
    """Fit the profile of an idle instance from steps that take about ``budget_s`` together; one is always run."""
    end = time.perf_counter() + budget_s
    swaps, moves = _bytes_points(parts, time.perf_counter() + BYTES_SHARE * budget_s)
    samples = measure_steps(parts, end)
    runner = parts.runner
    profile = fitting.fit(samples, parts.shapes, pair_tile(runner.backend), runner.padding_free, about)
    swap_call, swap_block = fitting.per_call_and_item(swaps)
    move_call, move_block = fitting.per_call_and_item(moves)
    return dataclasses.replace(
        profile,
        swap_call_s=swap_call,
        swap_block_s=swap_block,
        transfer_call_s=move_call,
        transfer_block_s=move_block,
    )


def measure_steps(parts: Parts, end: float) -> list[fitting.Sample]:
    """Run steps until ``end`` (of ``time.perf_counter``), each shape with little context and with much, in turns.

    What would not be over by then is left out; the first is run in any case.
    """
    runner, times = parts.runner, dict[tuple[StepShape, Rows], list[float]]()
    with scratch(parts.pool, _longest(parts)) as blocks:
        todo = _experiments(parts.shapes, min(parts.max_model_len, len(blocks) * parts.pool.block_size))
        for _ in range(ROUNDS):
            before = sum(map(len, times.values()))
            for shape, rows in todo:
                if not times or time.perf_counter() + _expected(times, shape, rows) < end:
                    plan = make_plan(runner, shape, rows, blocks)
                    times.setdefault((shape, rows), []).append(_time_step(runner, plan))
            if sum(map(len, times.values())) == before:
                break
    tile = pair_tile(runner.backend)
    return [
        fitting.Sample(shape, *work(shape, rows, tile), fitting.typical(seconds))
        for (shape, rows), seconds in times.items()
    ]


def time_prefill(parts: Parts, tokens: int, cached: int) -> float:
    """Seconds until the first token of a prompt whose first ``cached`` tokens (whole blocks) are in place.

    It is planned as an instance plans it, with one step in the air. The pool must have the room free.
    """
    pool, runner = parts.pool, parts.runner
    assert cached % pool.block_size == 0 and cached < tokens <= pool.free * pool.block_size, (tokens, cached)
    scheduler, caching = LocalScheduler(pool, parts.shapes), pool.caching
    request = Request("calibration", tuple(_tokens(runner, tokens)), ONE_TOKEN, 0)
    seq, flight = Running(request, list(request.prompt)), None
    pool.caching = False
    try:
        scheduler.adopt(seq, pool.alloc_mem(cached // pool.block_size), cached)
        began = time.perf_counter()
        while True:
            plan = scheduler.plan(began)
            following = runner.launch(plan) if plan is not None else None
            if flight is not None and scheduler.commit(flight.plan, flight.read()[0], began):
                return time.perf_counter() - began
            flight = following
    finally:
        if seq.blocks:
            scheduler.finish(seq)
        pool.caching = caching


@contextlib.contextmanager
def scratch(pool: BlockPool, most: int, medium: Medium = Medium.HBM) -> Iterator[list[BlockAddress]]:
    """At most so many blocks that are free now, to be written into; nothing that is cached is dropped for them."""
    ledger = pool.stats().hbm if medium is Medium.HBM else pool.stats().dram
    blocks = pool.alloc_mem(min(most, ledger.free), medium)
    try:
        yield blocks
    finally:
        pool.free_mem(blocks)


def make_plan(runner: Runner, shape: StepShape, rows: Rows, blocks: Sequence[BlockAddress]) -> Plan:
    """A step of these rows; each has blocks of its own where there are enough, else they share."""
    size, at, slices = runner.store.layout.block_size, 0, []
    for start, length in rows:
        count = -(-(start + length) // size)
        at = at if at + count <= len(blocks) else 0
        prompt = _tokens(runner, start + length)
        seq = Running(Request("calibration", tuple(prompt), ONE_TOKEN, 0), prompt)
        seq.table = [block.index for block in blocks[at : at + count]]
        slices.append(Slice(seq, start, length, True, INVALID, 0))
        at += count
    return Plan(0, shape, tuple(slices))


def _tokens(runner: Runner, count: int) -> list[int]:
    return [place % runner.vocab_size for place in range(count)]


def _time_step(runner: Runner, plan: Plan) -> float:
    began = time.perf_counter()
    runner.launch(plan).read()
    return time.perf_counter() - began


def _longest(parts: Parts) -> int:
    """Blocks that the widest experiment would like to have."""
    size = parts.pool.block_size
    one = -(-min(parts.max_model_len, LONG + parts.runner.max_seqs + max(s.tokens for s in parts.shapes)) // size)
    return max(one, parts.runner.max_seqs * -(-min(parts.max_model_len, LONG) // size))


def _experiments(shapes: Sequence[StepShape], longest: int) -> list[tuple[StepShape, Rows]]:
    """Steps to run, the most telling first: every shape with nothing before it, then with as much as there may be.

    The first of all is the smallest that can compute a prompt: without it nothing could be predicted.
    """
    first = min(shape for shape in shapes if shape.tokens > shape.seqs)
    short: list[tuple[StepShape, Rows]] = []
    long: list[tuple[StepShape, Rows]] = []
    for shape in sorted(shapes, key=lambda shape: (shape != first, shape.tokens)):
        if shape.tokens == shape.seqs:
            context = min(LONG // 2, longest - 1)
            short.append((shape, ((0, 1),) * shape.seqs))
            long.append((shape, ((context, 1),) * shape.seqs))
            continue
        new = min(shape.tokens, longest)
        short.append((shape, ((0, new),)))
        before = min(LONG, longest - new)
        if before > 0:
            long.append((shape, ((before, new),)))
    return [*short, *long]


def _expected(times: dict[tuple[StepShape, Rows], list[float]], shape: StepShape, rows: Rows) -> float:
    """What a step will take, at least: what it took before, else by its size from what was run."""
    if (shape, rows) in times:
        return fitting.typical(times[shape, rows])
    same = [min(seconds) for (other, _), seconds in times.items() if other == shape]
    if same:
        return 1.5 * max(same)
    return statistics.fmean(min(seconds) / other.tokens for (other, _), seconds in times.items()) * shape.tokens


def _bytes_points(parts: Parts, end: float) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(blocks, seconds) of swaps from host memory, and of what a transfer does with the pages at its two ends."""
    store, arena = parts.runner.store, parts.arena
    swaps: list[tuple[int, float]] = []
    moves: list[tuple[int, float]] = []
    with scratch(parts.pool, store.sizes[-1]) as blocks, scratch(parts.pool, store.sizes[-1], Medium.DRAM) as slots:
        for size in [size for size in store.sizes if size <= len(blocks)] * 3:
            if time.perf_counter() >= end and moves:
                break
            numbers = [block.index for block in blocks[:size]]

            def move(numbers: list[int] = numbers) -> None:
                piece = store.gather(numbers)
                store.checksums(piece)
                store.scatter(numbers, piece)

            moves.append((size, _time_bytes(parts, move)))
            if arena is not None and size <= len(slots):
                places = [slot.index for slot in slots[:size]]
                arena.write(places, store.gather(numbers))

                def swap_in(numbers: list[int] = numbers, places: list[int] = places) -> None:
                    piece = arena.read(places, store.sharding)
                    store.checksums(piece)
                    store.scatter(numbers, piece)

                swaps.append((size, _time_bytes(parts, swap_in)))
    return _lower_medians(swaps), _lower_medians(moves)


def _time_bytes(parts: Parts, call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    jax.block_until_ready(parts.runner.store.pages)
    return time.perf_counter() - began


def _lower_medians(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [
        (size, fitting.typical([seconds for other, seconds in points if other == size]))
        for size in dict.fromkeys(size for size, _ in points)
    ]
