"""Events: a reader that knows nothing else has the same cache as the pool, at every moment."""

from random import Random

import hypothesis.strategies as st
from hypothesis import given, settings
from pool_world import DRAM, HBM, C, World, random_calls

from jmemserve.kvpool import BlockPool, Medium, audit
from jmemserve.kvpool.events import START, EventLog, Removed, Snapshot, Stored


class Mirror:
    """What somebody far away knows from events: blocks by id, and where their copies are."""

    def __init__(self, snapshot: Snapshot | None = None):
        self.number = 0
        self.blocks: dict[int, tuple[bytes, int, bytes]] = {}  # space, id of the block before, tokens
        self.media: dict[int, set[Medium]] = {}  # no block without a copy is kept
        if snapshot is not None:
            self.number = snapshot.number
            for record in snapshot.stored:
                self.store(record)

    def read(self, log: EventLog) -> bool:
        """Apply what is new; False if something was missed."""
        events = log.since(self.number)
        if events is None:
            return False
        for event in events:
            assert event.number == self.number + 1
            self.number = event.number
            if isinstance(event, Stored):
                self.store(event)
            else:
                self.remove(event)
        return True

    def store(self, event: Stored) -> None:
        parent, step = event.parent, C * 4
        assert event.ids and len(event.tokens) == len(event.ids) * step
        for place, number in enumerate(event.ids):
            block = (event.space, parent, event.tokens[place * step : (place + 1) * step])
            assert self.blocks.setdefault(number, block) == block, "an id means one block"
            media = self.media.setdefault(number, set())
            assert event.medium not in media, f"{number} has a copy in {event.medium.name} already"
            media.add(event.medium)
            parent = number

    def remove(self, event: Removed) -> None:
        assert event.ids
        for number in event.ids:
            self.media[number].remove(event.medium)
            if not self.media[number]:
                del self.media[number], self.blocks[number]

    def prefixes(self) -> dict[tuple[str, tuple[int, ...]], set[Medium]]:
        """What a look-up could find: every block on the way has a copy."""
        found = {}
        for number, media in self.media.items():
            tokens, at = b"", number
            while at != START and at in self.blocks:
                space, at, part = self.blocks[at]
                tokens = part + tokens
            if at == START:
                found[space.decode().split("\0")[2], tuple(memoryview(tokens).cast("i"))] = media
        assert len(found) <= len(self.media)
        return found


def expect(mirror: Mirror, world: World) -> None:
    """The mirror is the index: by id, and by prefix where no block on the way lacks a copy."""
    by_id: dict[int, set[Medium]] = {}
    for node in audit.nodes(world.pool._index):
        for place, number in enumerate(node.ids):
            media = {HBM} if node.hbm[place] else set()
            media |= {DRAM} if node.dram and node.dram[place] > 0 else set()
            if media:
                by_id[number] = media
    assert mirror.media == by_id
    found = {}
    for (salt, tokens), (hbm, dram) in world.copies.items():
        if len(world.expected(tokens, salt)) == len(tokens) // C:
            found[salt, tokens] = {medium for medium, block in ((HBM, hbm), (DRAM, dram)) if block}
    assert mirror.prefixes() == found


def follow(random: Random, calls: int, sizes: tuple[int, int], quota=None) -> World:
    """Random calls, with one reader from the start, and one that starts from a snapshot now and then."""
    log = EventLog()
    world = World(*sizes, quota=quota, log=log)
    first, late = Mirror(), Mirror()
    for call in range(calls):
        if call % 10 == 5:
            late = Mirror(world.pool.snapshot())
            assert late.number == log.last and late.media == first.media
        random_calls(world, random)()
        for mirror in (first, late):
            assert mirror.read(log)
            expect(mirror, world)
    world.finish()
    world.pool.clear()
    assert first.read(log) and not first.media and not first.blocks
    return world


def test_a_reader_has_the_same_cache_as_the_pool():
    random = Random(5)
    events = sum(
        follow(random, 300, (random.randint(2, 16), random.randint(0, 16)), quota).pool.log.last
        for quota in [None] * 8 + [(6, 4)] * 2
    )
    assert events > 800


@settings(max_examples=30, deadline=None)
@given(random=st.randoms(use_true_random=False), sizes=st.tuples(st.integers(1, 12), st.integers(0, 12)))
def test_any_reader_has_the_same_cache_as_the_pool(random, sizes):
    follow(random, 40, sizes)


def test_who_missed_something_is_told_and_helped_by_a_snapshot():
    log = EventLog(capacity=6)
    world, random = World(12, 8, log=log), Random(1)
    mirror, snapshots = Mirror(), 0
    for _ in range(400):
        for _ in range(random.randrange(6)):
            random_calls(world, random)()
        missed = log.last - mirror.number > 6
        assert mirror.read(log) is not missed
        if missed:
            mirror, snapshots = Mirror(world.pool.snapshot()), snapshots + 1
            assert mirror.number == log.last and mirror.read(log)
        expect(mirror, world)
    assert snapshots > 5


def test_numbers_have_no_gaps_and_the_future_is_a_gap():
    log = EventLog(capacity=3)
    assert log.since(0) == []
    for number in range(5):
        log.removed(HBM, [number])
    assert [event.number for event in log.since(2)] == [3, 4, 5]
    assert log.since(5) == []
    assert log.since(1) is None and log.since(0) is None
    assert log.since(6) is None, "a number of another life"


def test_lesson_17_a_copy_that_goes_is_not_the_block_while_another_lives():
    pool = BlockPool("a", 1, 2, C, 2, log=EventLog())
    assert pool.log is not None
    mirror = Mirror()
    addresses = pool.alloc_mem(2)
    pool.insert(range(2 * C), addresses)
    pool.free_mem(addresses)
    assert pool.write_back(2) == 2
    mirror.read(pool.log)
    assert set(map(frozenset, mirror.media.values())) == {frozenset({HBM})}, "on its way is not there"
    for swap in pool.swaps.take():
        pool.swaps.done(swap)
    mirror.read(pool.log)
    assert set(map(frozenset, mirror.media.values())) == {frozenset({HBM, DRAM})}
    held, start = pool.alloc_mem(2), mirror.number
    events = pool.log.since(start)
    assert events is not None and all(isinstance(event, Removed) and event.medium is HBM for event in events)
    mirror.read(pool.log)
    assert list(mirror.media.values()) == [{DRAM}, {DRAM}] and len(mirror.prefixes()) == 2
    assert pool.peek_media(range(2 * C + 1)) == (0, 2)
    pool.free_mem(held)
    assert pool.clear() == 2
    mirror.read(pool.log)
    assert not mirror.media


def test_ids_are_never_used_again():
    pool, seen = BlockPool("a", 1, 2, C, log=EventLog()), set()
    for start in range(0, 50, 5):
        addresses = pool.alloc_mem(1)
        pool.insert(range(start, start + C), addresses)
        pool.free_mem(addresses)
        pool.delete(range(start, start + C))
    for event in pool.log.since(0):
        if isinstance(event, Stored):
            assert not seen & set(event.ids)
            seen |= set(event.ids)
    assert len(seen) == 10
