"""The feeds: the tree is what the pools say, whatever happens on the way, and what is taught is forgotten in time."""

import sys
from pathlib import Path
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

sys.path.insert(0, str(Path(__file__).parents[1] / "kvpool"))
from pool_world import C, World, prompt, random_calls  # noqa: E402

from jmemserve.kvpool import BlockPool, Medium  # noqa: E402
from jmemserve.kvpool.events import START, EventLog, Removed, Snapshot, Stored  # noqa: E402
from jmemserve.kvpool.runs import pack  # noqa: E402
from jmemserve.scheduler.prompt_tree import Holding, PromptTree  # noqa: E402
from jmemserve.scheduler.tree_feeds import EventFeed, TtlFeed  # noqa: E402

HBM, DRAM = Medium.HBM, Medium.DRAM
SALTS = ("", "b")
SPACE = b"model\0\0"
STEP = 4 * C


def match(tree, tokens, salt=""):
    blocks = max(0, len(tokens) - 1) // C
    return tree.match(pack(tokens, blocks * C), salt, blocks)


def stored(number, parent, ids, tokens, medium=HBM, space=SPACE):
    return Stored(number, medium, space, parent, tuple(ids), pack(tokens, len(tokens)))


class Cluster:
    """Pools that random calls come to, each with a reader of its events; one tree."""

    def __init__(self, random, sizes, log=65_536):
        self.random, self.tree, self.capacity = random, PromptTree(C), log
        self.worlds, self.feeds = {}, {}
        self.restores = self.lives = 0
        for place, (hbm, dram) in enumerate(sizes):
            self.join(f"i{place}", hbm, dram)

    def join(self, name, hbm, dram, late=0):
        self.worlds[name] = World(hbm, dram, log=EventLog(self.capacity))
        self.tree.join(name)
        self.feeds[name] = EventFeed(self.tree, name)
        self.lives += 1

    def call(self, name, times=1):
        for _ in range(times):
            random_calls(self.worlds[name], self.random)()

    def read(self, name):
        pool, feed = self.worlds[name].pool, self.feeds[name]
        events = pool.log.since(feed.number)
        if events is None or not feed.apply(events):
            assert events is None, "what the log has is never refused"
            snapshot = pool.snapshot()
            parts = [snapshot.stored[place : place + 3] for place in range(0, len(snapshot.stored), 3)]
            feed.restore(Snapshot(snapshot.number, parts[0] if parts else ()))
            for part in parts[1:]:
                feed.extend(Snapshot(snapshot.number, part))
            self.restores += 1
        assert feed.number == pool.log.last and not feed.partial

    def expect(self, checked=True):
        """The tree says of every prompt what each pool would find."""
        for salt in SALTS:
            for seed in range(8):
                tokens = (*prompt(seed, 8), 0)
                truth = {}
                for name, world in self.worlds.items():
                    if world.pool.caching:
                        hbm, dram = world.pool.peek_media(tokens, salt)
                        if hbm + dram:
                            truth[name] = Holding(hbm + dram, dram)
                found = match(self.tree, tokens, salt)
                assert {name: held for name, held in found.items() if self.worlds[name].pool.caching} == truth
        if checked:
            self.tree.check()
            for name, feed in self.feeds.items():
                held = sum(1 for node in _held(self.tree, name) for _ in range(node.start, node.stop))
                assert feed._known.num_ids == held, f"{name}: {feed._known.num_ids} ids, {held} blocks"
                assert len(feed._known) <= held


def _held(tree, name):
    bit = tree.slots[name].bit
    stack = [child for root in tree.roots.values() for child in root.children.values()]
    while stack:
        node = stack.pop()
        stack += node.children.values()
        if (node.hbm | node.dram) & bit:
            yield node


@pytest.mark.parametrize("seed", range(4))
def test_the_tree_is_what_several_pools_hold(seed):
    random = Random(seed)
    cluster = Cluster(random, [(random.randint(2, 16), random.randint(0, 16)) for _ in range(3)])
    for _ in range(150):
        name = random.choice(list(cluster.worlds))
        cluster.call(name)
        cluster.read(name)
        cluster.expect()
    assert not cluster.restores
    for name in list(cluster.worlds):
        cluster.worlds[name].pool.clear()
        cluster.read(name)
    assert cluster.tree.num_blocks == cluster.tree.num_nodes == 0 and not cluster.tree.roots
    assert not any(feed._known._pages or feed._waiting for feed in cluster.feeds.values())


@settings(max_examples=30, deadline=None)
@given(random=st.randoms(use_true_random=False), sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=4))
def test_any_pools(random, sizes):
    cluster = Cluster(random, sizes)
    for _ in range(30):
        name = random.choice(list(cluster.worlds))
        cluster.call(name)
        cluster.read(name)
        cluster.expect()


def test_a_gap_changes_nothing_and_a_snapshot_heals_it():
    random = Random(7)
    cluster = Cluster(random, [(12, 8), (10, 0), (6, 12)], log=12)
    for _ in range(150):
        for name in cluster.worlds:
            cluster.call(name, random.randrange(8))
            cluster.read(name)
        cluster.expect()
        if random.random() < 0.1:  # a life ends, another begins: the slot is used again
            name = random.choice(list(cluster.worlds))
            if random.random() < 0.5:
                cluster.feeds[name].close()
            cluster.tree.leave(name)
            del cluster.worlds[name]
            cluster.expect(checked=False)
            cluster.join(name, random.randint(2, 12), random.randint(0, 12))
            cluster.expect()
    assert cluster.restores > 20 and cluster.lives > 10 and len(cluster.tree._taken) == 3
