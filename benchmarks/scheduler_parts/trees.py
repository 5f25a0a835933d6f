"""The global prompt tree: a match among many instances, events per second, and bytes per block."""

import dataclasses
import gc
import itertools
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter, thread_time
from typing import Any, NamedTuple

import numpy as np
from pool_parts.rows import Aim, Part, Row, median
from scheduler_parts.believers import BLOCK, STEP, SYSTEM, Believer, Hashes, Indices, Tree

CONVERSATION = 256  # blocks, with the system prompt
SEVERAL = 0.2  # of the conversations are held by three instances, the others by one
PROBES = 32  # prompts of each length that are matched, if there is room for so many
MATCHES = 2000  # at least, of each length
CHANGES = 256  # prompts whose events are timed
MESSAGE = 64  # events
REMARKS = [
    "events: by the time of the thread, which others on the machine change less than that of the clock",
    "bytes: by tracemalloc, beside the tokens and with them",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """What is varied."""

    tokens: tuple[int, ...]
    instances: tuple[int, ...]
    blocks: tuple[int, ...]
    plain: int  # blocks of the largest tree that the plain ways are given


class Conversation(NamedTuple):
    """Some instances hold so many of its first blocks; all begin with the same system prompt."""

    number: int
    raw: bytes
    holders: tuple[tuple[int, int], ...]  # instance, blocks


def measure(repeats: int, sizes: Sizes) -> Part:
    """Every size; the plain ways only where they fit."""
    matches: list[Row] = []
    changes: list[Row] = []
    for blocks in sizes.blocks:
        for instances in sizes.instances:
            conversations, probes = _world(blocks, instances, sizes.tokens)
            tree = Tree(instances)
            plain: dict[str, Believer] = {}
            if blocks <= sizes.plain:
                capacities = [2 * SYSTEM] * instances
                for each in conversations:
                    for instance, count in each.holders:
                        capacities[instance] += count
                plain = {"hashes": Hashes(instances), "indices": Indices(instances, capacities)}
            for believer in (tree, *plain.values()):
                _fill(believer, conversations)
            assert tree.tree.num_blocks >= blocks - CONVERSATION, f"{tree.tree.num_blocks=} {blocks=}"
            for tokens, prompts in probes.items():
                row: Row = {"blocks": blocks, "instances": instances, "tokens": tokens, "prompts": len(prompts)}
                matches.append(row | _matches({"tree": tree, **plain}, prompts, repeats))
            changes += _changes(tree, blocks, instances, repeats)
            del tree, plain, conversations, probes, believer
            gc.collect()
    memory = [_memory(min(sizes.plain, max(sizes.blocks)), instances) for instances in sizes.instances[:2]]
    tables = {"a match": matches, "events, in blocks per second of CPU": changes, "bytes per block": memory}
    return Part(tables, _aims(matches, changes), REMARKS)


def _aims(matches: list[Row], changes: list[Row]) -> list[Aim]:
    aims = []
    for row in matches:
        if row["tokens"] == 4096 and row["instances"] == 64:
            what = f"match of 4,096 tokens, 64 instances, {row['blocks']:,} blocks"
            aims += [Aim(what, row["tree_us"], 100, "us"), Aim(f"p99 of a {what}", row["tree_p99_us"], 500, "us")]
    for kind in ("prompts", "decode", "eviction"):
        slowest = min(row["tree"] for row in changes if row["events"] == kind)
        aims.append(Aim(f"events of {kind}, the slowest", slowest, 200_000, "blocks per second of CPU", at_least=True))
    return aims


def _world(blocks: int, instances: int, lengths: tuple[int, ...]) -> tuple[list[Conversation], dict[int, list[bytes]]]:
    """A system prompt that all hold, conversations of many sizes, and by length those that will be asked for."""
    rng = np.random.default_rng(0)
    system = _tokens(rng, SYSTEM)
    all_of_it = tuple((instance, SYSTEM) for instance in range(instances))
    conversations, probes, left = [Conversation(0, system, all_of_it)], {}, blocks - SYSTEM
    for length in lengths:
        count = length // BLOCK
        number = min(PROBES, left // (2 * count))
        if number:
            probes[length] = []
        for _ in range(number):
            raw = system + _tokens(rng, count - SYSTEM)
            some = rng.choice(instances, min(4, instances), replace=False).tolist()
            holders = tuple((int(i), max(SYSTEM + 1, count >> place)) for place, i in enumerate(some))
            conversations.append(Conversation(len(conversations), raw, holders))
            probes[length].append(raw)
            left -= count - SYSTEM
    while left >= CONVERSATION:
        raw = system + _tokens(rng, CONVERSATION - SYSTEM)
        some = rng.choice(instances, min(3 if rng.random() < SEVERAL else 1, instances), replace=False).tolist()
        holders = tuple((int(i), max(SYSTEM + 1, CONVERSATION >> place)) for place, i in enumerate(some))
        conversations.append(Conversation(len(conversations), raw, holders))
        left -= CONVERSATION - SYSTEM
    return conversations, probes


def _tokens(rng: np.random.Generator, blocks: int) -> bytes:
    return rng.integers(0, 1 << 17, blocks * BLOCK, np.int32).tobytes()


def _fill(believer: Believer, conversations: list[Conversation]) -> None:
    for each in conversations:
        for instance, count in each.holders:
            change = believer.store(instance, each.number, each.raw[: count * STEP], SYSTEM if each.number else 0)
            assert believer.take(instance, (change,)), f"conversation {each.number} was refused"


def _matches(believers: dict[str, Believer], prompts: list[bytes], repeats: int) -> Row:
    """Microseconds of one match, every prompt in turn; the plain ways get fewer rounds."""
    truth = [believers["tree"].match(raw) for raw in prompts]
    row: Row = {"holders": len(truth[0])}
    for name, believer in believers.items():
        rounds = max(repeats, MATCHES // len(prompts)) if name == "tree" else repeats
        times = []
        for turn in range(rounds + 1):  # the first does not count
            for raw, expected in zip(prompts, truth, strict=True):
                start = perf_counter()
                found = believer.match(raw)
                spent = perf_counter() - start
                assert turn or found == expected, f"{name} finds another answer than the tree"
                if turn:
                    times.append(spent)
        row[f"{name}_us"] = 1e6 * median(times)
        if name == "tree":
            row["tree_p99_us"] = 1e6 * float(np.percentile(times, 99))
    return row


def _changes(tree: Tree, blocks: int, instances: int, repeats: int) -> list[Row]:
    """Blocks per second of CPU: new prompts, their decoding, their eviction; a snapshot; an instance that leaves."""
    rng = np.random.default_rng(1)
    system = _tokens(np.random.default_rng(0), SYSTEM)
    ways: dict[str, Believer] = {"tree": tree, "hashes": Hashes(instances)}
    _fill(ways["hashes"], [Conversation(0, system, tuple((i, SYSTEM) for i in range(instances)))])
    rates: dict[str, dict[str, list[float]]] = {}
    for turn in range(repeats + 1):  # the first does not count
        news = [system + _tokens(rng, CONVERSATION) for _ in range(CHANGES)]
        for name, believer in ways.items():
            for kind, seconds, count in _steps(believer, news, instances, 1_000_000_000 + turn * CHANGES):
                if turn:
                    rates.setdefault(kind, {}).setdefault(name, []).append(count / seconds)
    rows: list[Row] = []
    for kind, by_name in rates.items():
        row = {"blocks": blocks, "instances": instances, "events": kind}
        rows.append(row | {name: median(values) for name, values in by_name.items()})
    largest = max(range(instances), key=lambda i: tree.tree.slots[tree.names[i]].copies)
    slot, snapshot = tree.tree.slots[tree.names[largest]], tree.snapshot(largest)
    restores, leaves = [], []
    for _ in range(max(1, min(3, repeats))):
        start = thread_time()
        tree.feeds[largest].close()
        leaves.append(thread_time() - start)
        start = thread_time()
        tree.feeds[largest].restore(snapshot)
        restores.append(thread_time() - start)
    held = slot.copies
    rows.append({"blocks": blocks, "instances": instances, "events": "snapshot", "tree": held / median(restores)})
    rows.append({"blocks": blocks, "instances": instances, "events": "leaving", "tree": held / median(leaves)})
    return rows


def _steps(believer: Believer, news: list[bytes], instances: int, first: int) -> Iterator[tuple[str, float, int]]:
    """The life of some prompts: computed, decoded a block at a time in turns, evicted half in parts and half whole."""
    half, whole = SYSTEM + CONVERSATION // 2, SYSTEM + CONVERSATION
    places = [(number * instances // len(news), first + number, raw) for number, raw in enumerate(news)]

    def timed(changes: Iterable[tuple[int, Any]]) -> float:
        """What one instance has to say in a row is one message, up to a size."""
        spent = 0.0
        for instance, some in itertools.groupby(changes, lambda change: change[0]):
            for message in itertools.batched((change for _, change in some), MESSAGE):
                start = thread_time()
                taken = believer.take(instance, message)
                spent += thread_time() - start
                assert taken, "an event was refused"
        return spent

    count = len(news) * (half - SYSTEM)
    computed = ((i, believer.store(i, n, raw[: half * STEP], SYSTEM)) for i, n, raw in places)
    yield "prompts", timed(computed), count
    decoded = (
        (i, believer.store(i, n, raw[: at * STEP + STEP], at)) for at in range(half, whole) for i, n, raw in places
    )
    yield "decode", timed(decoded), count
    backwards = range(whole - 1, half - 1, -1)
    evicted = ((i, believer.remove(i, n, raw[: at * STEP + STEP], at)) for at in backwards for i, n, raw in places)
    yield "eviction", timed(evicted), count
    evicted = ((i, believer.remove(i, n, raw[: half * STEP], SYSTEM)) for i, n, raw in places)
    yield "eviction of runs", timed(evicted), count


def _memory(blocks: int, instances: int) -> Row:
    """Bytes beside the tokens, per block that is known and per copy of it."""
    conversations, _ = _world(blocks, instances, ())
    copies = sum(count - (SYSTEM if each.number else 0) for each in conversations for _, count in each.holders)
    capacities = [2 * SYSTEM] * instances
    for each in conversations:
        for instance, count in each.holders:
            capacities[instance] += count
    makers: dict[str, Callable[[], Believer]] = {
        "tree": lambda: Tree(instances),
        "hashes": lambda: Hashes(instances),
        "indices": lambda: Indices(instances, capacities),
    }
    row: Row = {"blocks": blocks, "instances": instances, "copies": copies}
    for name, make in makers.items():
        gc.collect()
        tracemalloc.start()
        try:
            believer = make()
            _fill(believer, conversations)
            if isinstance(believer, Tree):
                believer._ids.clear()  # a pool knows them, the front-end does not
                row["nodes"] = believer.tree.num_nodes
            elif isinstance(believer, Hashes):
                believer._known.clear()
            else:
                believer._free.clear()
            gc.collect()
            size = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        tokens = {"tree": blocks, "hashes": 0, "indices": copies}[name]
        row[f"{name}_bytes"] = (size - tokens * STEP) / blocks
        row[f"{name}_with_tokens"] = size / blocks
        del believer
    return row
