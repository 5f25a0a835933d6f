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
        self.tree.run_limit = random.choice((2, 3, 1000))
        self.worlds, self.feeds = {}, {}
        self.restores = self.lives = self.waited = 0
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

    def read(self, name, anew=False):
        pool, feed = self.worlds[name].pool, self.feeds[name]
        events = pool.log.since(feed.number)
        if events is None and self.random.random() < 0.5:
            late = pool.log.since(pool.log.last - 1)
            blocks = self.tree.num_blocks
            assert not feed.apply(late) and self.tree.num_blocks == blocks, "a gap"
        if anew or events is None or not feed.apply(events):
            assert anew or events is None, "what the log has is never refused"
            snapshot = pool.snapshot()
            parts = [snapshot.stored[place : place + 3] for place in range(0, len(snapshot.stored), 3)]
            feed.restore(Snapshot(snapshot.number, parts[0] if parts else ()))
            for part in parts[1:]:
                feed.extend(Snapshot(snapshot.number, part))
            self.restores += 1
            self.waited += bool(feed._waiting)
            assert feed.apply(pool.log.since(max(0, feed.number - 2)) or ()), "older events are nothing new"
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
@given(
    random=st.randoms(use_true_random=False),
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=4),
)
def test_any_pools(random, sizes):
    cluster = Cluster(random, sizes)
    for _ in range(30):
        name = random.choice(list(cluster.worlds))
        cluster.call(name)
        cluster.read(name)
        cluster.expect()


def test_a_gap_changes_nothing_and_a_snapshot_heals_it():
    random = Random(7)
    cluster = Cluster(random, [(12, 8), (10, 0), (6, 12)], log=5)
    for _ in range(200):
        for name in cluster.worlds:
            cluster.call(name, random.randrange(8))
            cluster.read(name, anew=random.random() < 0.1)
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
    assert cluster.restores > 50 and cluster.waited and cluster.lives > 10 and len(cluster.tree._taken) == 3


def test_what_continues_a_block_without_a_copy_waits_for_it():
    """In a snapshot a block whose only copy is on its way has no place, and what continues it has."""
    pool = BlockPool("a", 1, 3, C, 3, log=EventLog())
    blocks = pool.alloc_mem(3)
    pool.insert(range(3 * C), blocks)
    pool.free_mem(blocks)
    assert pool.write_back(1) == 1
    for swap in pool.swaps.take():
        pool.swaps.done(swap)
    assert pool.swap_out(3) == 3  # the last one has its copy already
    tree = PromptTree(C)
    tree.join("a")
    feed = EventFeed(tree, "a")
    feed.restore(pool.snapshot())
    assert match(tree, range(3 * C + 1)) == {} and len(feed._waiting) == 1 and tree.num_blocks == 0
    for swap in pool.swaps.take():
        pool.swaps.done(swap)
    assert feed.apply(pool.log.since(feed.number))
    assert match(tree, range(3 * C + 1)) == {"a": Holding(3, 3)} and not feed._waiting
    pool.clear()
    assert feed.apply(pool.log.since(feed.number)) and tree.num_blocks == 0 and not feed.partial


def test_a_block_gets_another_copy_while_the_one_before_has_none():
    tree, tokens = PromptTree(C), list(range(3 * C))
    tree.join("a")
    feed = EventFeed(tree, "a")
    assert feed.apply([stored(1, START, [1, 2], tokens[: 2 * C]), Removed(2, HBM, (1,))])
    assert feed.apply([stored(3, 1, [2], tokens[C : 2 * C], DRAM)]) and match(tree, [*tokens, 0]) == {}
    assert feed.apply([stored(4, 2, [3], tokens[2 * C :]), Removed(5, HBM, (2,))])
    assert feed.apply([stored(6, START, [1], tokens[:C], DRAM)])
    assert match(tree, [*tokens, 0]) == {"a": Holding(3, 2)}
    tree.check()


@pytest.mark.parametrize(
    "event",
    [
        stored(3, 99, [10], [7] * C),  # a parent that nobody knows and that is younger
        stored(3, 2, [3], [7] * (C + 1)),  # half a block more
        stored(3, 2, [], []),
        stored(3, 2, [3, 3], [7] * 2 * C),
        stored(3, 2, [4, 3], [7] * 2 * C),
        stored(3, 2, [0], [7] * C),
        stored(3, 2, [-5], [7] * C),
        stored(3, 2, [2**80], [7] * C),
        stored(3, 2, [1], [7] * C),  # the id of another block
        stored(3, START, [2], [7] * C),
        stored(3, 2, [3], [7] * C, Medium.MIXED),
        Removed(3, HBM, ()),
        Removed(3, HBM, (77,)),
        Removed(3, HBM, (2, 2)),
        Removed(3, HBM, (2, 1, 3)),
        Removed(3, DRAM, (2,)),
        Removed(3, Medium.MIXED, (2,)),
        Removed(3, HBM, (2**80,)),
        stored(2**70, 2, [3], [7] * C),
    ],
    ids=str,
)
def test_a_wrong_event_is_refused_until_a_snapshot(event):
    tree = PromptTree(C)
    for name in "ab":
        tree.join(name)
    feed, other = EventFeed(tree, "a"), EventFeed(tree, "b")
    tokens = list(range(2 * C))
    start = [stored(1, START, [1], tokens[:C]), stored(2, 1, [2], tokens[C:])]
    assert feed.apply(start) and other.apply(start)
    assert feed.apply([event]) is False and feed.number == 2
    assert feed.apply([stored(3, 2, [3], [7] * C)]) is (event.number != 3), "after a gap the missing one may still come"
    tree.check()
    assert match(tree, [*tokens, 0])["b"] == Holding(2, 0), "nobody else is touched"
    feed.restore(Snapshot(9, (stored(0, START, [1, 2], tokens),)))
    assert feed.apply([Removed(8, HBM, (1,)), Removed(10, HBM, (2,))])
    assert match(tree, [*tokens, 0]) == {"a": Holding(1, 0), "b": Holding(2, 0)}
    feed.close()
    other.close()
    tree.check()
    assert tree.num_blocks == 0 and not tree.slots["a"].copies


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_nonsense_never_raises_and_leaves_nothing_behind(data):
    tree = PromptTree(C, max_blocks=20)
    for name in "ab":
        tree.join(name)
    feeds = [EventFeed(tree, name) for name in "ab"]
    ids = st.lists(st.integers(0, 9), min_size=1, max_size=4)
    for _ in range(data.draw(st.integers(1, 25))):
        feed = feeds[data.draw(st.integers(0, 1))]
        medium, some, parent = data.draw(st.sampled_from([HBM, DRAM])), data.draw(ids), data.draw(st.integers(0, 9))
        if data.draw(st.booleans()):
            some = sorted(set(some))
            tokens = [data.draw(st.integers(0, 1))] * C * len(some)
            event = stored(feed.number + 1, parent, some, tokens, medium)
        else:
            event = Removed(feed.number + 1, medium, tuple(some))
        if not feed.apply([event]) and isinstance(event, Stored):
            feed.restore(Snapshot(3, (event,)))
        tree.check()
    for feed in feeds:
        feed.close()
    assert tree.num_blocks == 0
    tree.check()


def test_a_full_tree_credits_nothing_new_and_forgets_rightly():
    tree = PromptTree(C, max_blocks=3)
    for name in "ab":
        tree.join(name)
    a, b = EventFeed(tree, "a"), EventFeed(tree, "b")
    tokens = list(range(5 * C))
    assert a.apply([stored(1, START, [1, 2, 3, 4, 5], tokens)]) and a.partial
    assert b.apply([stored(1, START, [1, 2], tokens[: 2 * C]), stored(2, START, [3], [99] * C)]) and b.partial
    assert match(tree, [*tokens, 0]) == {"a": Holding(3, 0), "b": Holding(2, 0)} and tree.num_blocks == 3
    assert a.apply([stored(2, 5, [6], [99] * C), Removed(3, HBM, (6, 5, 4, 3))]), "ids left out are no mistake"
    assert b.apply([stored(3, 3, [4], [98] * C), Removed(4, HBM, (3,))])
    assert match(tree, [*tokens, 0]) == {"a": Holding(2, 0), "b": Holding(2, 0)}
    tree.check()
    assert a.apply([Removed(4, HBM, (1, 2))]) and b.apply([Removed(5, HBM, (1, 2))]) and tree.num_blocks == 0


def test_events_of_who_is_gone_change_nothing():
    tree = PromptTree(C)
    tree.join("a")
    feed = EventFeed(tree, "a")
    assert feed.apply([stored(1, START, [1], range(C))])
    tree.leave("a")
    tree.join("b")  # in the place of a
    assert not feed.apply([stored(2, START, [2], range(9, 9 + C))])
    feed.restore(Snapshot(2, (stored(0, START, [1], range(C)),)))
    feed.close()
    assert tree.num_blocks == 0 and match(tree, range(C + 1)) == {}
    feed = EventFeed(tree, "b")
    assert feed.apply([stored(1, START, [1], range(C))])
    tree.clear()
    assert not feed.apply([Removed(2, HBM, (1,))]), "a snapshot is needed"
    feed.restore(Snapshot(2, (stored(0, START, [1], range(C)),)))
    assert match(tree, range(C + 1)) == {"b": Holding(1, 0)}


def test_eviction_from_the_end_of_a_shared_run_leaves_no_node_per_block():
    tree, tokens, n = PromptTree(C), list(range(100 * C)), 100
    feeds = []
    for name in "abc":
        tree.join(name)
        feeds.append(EventFeed(tree, name))
        assert feeds[-1].apply([stored(1, START, range(1, n + 1), tokens)])
    for count in range(1, n):
        assert feeds[0].apply([Removed(count + 1, HBM, (n + 1 - count,))])
        assert tree.num_nodes == 2 and len(feeds[0]._known) == 1
    assert feeds[0].apply([Removed(n + 1, HBM, (1,))]) and tree.num_nodes == 1
    for count in range(n):  # and as it is computed again, block by block
        event = stored(
            n + 2 + count, n + count if count else START, [n + 1 + count], tokens[count * C : (count + 1) * C]
        )
        assert feeds[0].apply([event]) and tree.num_nodes <= 2 and len(feeds[0]._known) == 1
    assert tree.num_nodes == 1
    tree.check()


def test_decoding_grows_one_node():
    tree = PromptTree(C)
    tree.join("a")
    feed = EventFeed(tree, "a")
    for number in range(1, 200):
        assert feed.apply([stored(number, number - 1, [number], [number] * C)])
    assert (tree.num_blocks, tree.num_nodes, len(feed._known)) == (199, 1, 1)


# -- responses ---------------------------------------------------------------------------------------------------------


def test_what_was_taught_ends_and_is_renewed():
    tree = PromptTree(C)
    feeds = {}
    for name in "ab":
        tree.join(name)
        feeds[name] = TtlFeed(tree, name, 10.0, 100)
    feeds["a"].learn(pack(range(2 * C), 2 * C), "", 0.0)
    feeds["b"].learn(pack(range(2 * C), 2 * C), "", 6.0)
    feeds["a"].learn(pack(range(C), C), "", 6.0)
    tokens = range(2 * C + 1)
    for now, truth in ((9.0, (2, 2)), (10.0, (1, 2)), (15.9, (1, 2)), (16.0, (0, 0))):
        for feed in feeds.values():
            feed.expire(now)
        tree.check()
        found = match(tree, tokens)
        assert tuple(found.get(name, (0,))[0] for name in "ab") == truth
    assert tree.num_blocks == 0


def test_the_oldest_leave_when_there_are_too_many():
    tree = PromptTree(C)
    tree.join("a")
    feed = TtlFeed(tree, "a", 100.0, 4)
    one, other, third = [1, 2] * C, [3, 4] * C, [5] * C
    for now, tokens in enumerate((one, other, one[:C], third)):
        feed.learn(pack(tokens, len(tokens)), "", float(now))
    assert [match(tree, [*tokens, 0])["a"].blocks for tokens in (one, other, third)] == [1, 2, 1], "an end was oldest"
    feed.learn(pack(range(100 * C), 100 * C), "", 9.0)
    assert match(tree, range(100 * C)) == {"a": Holding(4, 0)} and tree.num_blocks == 4


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_it_agrees_with_a_list_of_what_was_taught(data):
    tree, told, now, ttl = PromptTree(1), [], 0.0, 5.0
    tree.run_limit = data.draw(st.sampled_from([2, 3, 100]))
    limit = data.draw(st.sampled_from([4, 1000]))
    feeds = {}
    for name in "abc":
        tree.join(name)
        feeds[name] = TtlFeed(tree, name, ttl, limit)
    for _ in range(data.draw(st.integers(1, 40))):
        tokens = data.draw(st.lists(st.integers(0, 1), max_size=7))
        what = data.draw(st.sampled_from(["learn", "learn", "learn", "match", "wait", "close"]))
        name = data.draw(st.sampled_from("abc"))
        feed = feeds[name]
        if what == "learn":
            feed.learn(pack(tokens, len(tokens)), "", now)
            told.append((tokens[:limit], name, now))
        elif what == "wait":
            now += data.draw(st.sampled_from([0.5, 2.0, 5.0]))
        elif what == "close":
            feed.close()
            told = [entry for entry in told if entry[1] != name]
        for each in feeds.values():
            each.expire(now)
            assert tree.slots[each.instance].copies <= limit
            assert len(each._lessons) <= 2 * tree.slots[each.instance].copies + 64
        tree.check()
        truth = {}
        for known, teacher, time in told:
            same = 0
            while same < min(len(known), len(tokens)) and known[same] == tokens[same]:
                same += 1
            if same and now - time < ttl:
                truth[teacher] = max(truth.get(teacher, 0), same)
        found = {name: held.blocks for name, held in tree.match(pack(tokens, len(tokens)), "", 99).items()}
        if limit == 1000:
            assert found == truth
        else:
            assert all(blocks <= truth.get(name, 0) for name, blocks in found.items())
    for each in feeds.values():
        each.expire(now + ttl)
    assert tree.num_blocks == 0


def test_both_kinds_of_feeds_may_share_a_tree():
    tree, tokens = PromptTree(C), list(range(6 * C))
    for name in "ab":
        tree.join(name)
    events, lessons = EventFeed(tree, "a"), TtlFeed(tree, "b", 10.0, 100)
    lessons.learn(pack(tokens, len(tokens)), "", 0.0)
    assert events.apply([stored(1, START, range(1, 7), tokens), Removed(2, HBM, (6, 5, 4)), Removed(3, HBM, (1,))])
    tree.check()
    assert match(tree, [*tokens, 0]) == {"b": Holding(6, 0)}
    lessons.expire(10.0)
    tree.check()
    assert events.apply([stored(4, START, [1], tokens[:C])]) and match(tree, tokens) == {"a": Holding(3, 0)}


def test_lessons_of_one_prompt_do_not_pile_up():
    tree = PromptTree(C)
    tree.join("a")
    feed = TtlFeed(tree, "a", 1e9, 100)
    for now in range(5000):
        feed.learn(pack(range(3 * C), 3 * C), "", float(now))
        assert len(feed._lessons) <= 71
    assert tree.num_blocks == 3


@pytest.mark.parametrize("seed", range(60))
def test_what_is_learnt_expires_or_is_unlearnt_leaves_a_sound_tree(seed):
    """Three instances, prompts that begin alike, runs that split early; lives end too."""
    random = Random(seed)
    tree, feeds = PromptTree(1), {}
    tree.run_limit = random.choice([2, 3, 5, 8])

    def begin(name):
        tree.join(name)
        feeds[name] = TtlFeed(tree, name, random.choice([3.0, 8.0]), random.choice([20, 1000]))

    for name in "abc":
        begin(name)
    bases = [[random.randrange(3) for _ in range(random.randrange(1, 30))] for _ in range(4)]
    more = [base[: random.randrange(len(base) + 1)] + [random.randrange(3) for _ in range(10)] for base in bases]
    now = 0.0
    for _ in range(150):
        now += random.choice([0, 0, 0.5, 2])
        name, tokens, what = random.choice("abc"), random.choice([*bases, *more]), random.random()
        count = random.randrange(1, len(tokens) + 1)
        if what < 0.65:
            feeds[name].learn(pack(tokens, count), "", now)
        elif what < 0.8:
            feeds[name].expire(now)
        elif what < 0.97:
            kept = random.randrange(count + 1)
            feeds[name].unlearn(pack(tokens, count), "", kept)
            held = tree.match(pack(tokens, len(tokens)), "", count).get(name, Holding(0, 0)).blocks
            assert held <= kept or held == count or tree.slots[name].copies > held, "only what goes on is left"
        else:
            feeds[name].close()
            tree.leave(name)
            begin(name)
        tree.check()
    for name in "abc":
        feeds[name].close()
    assert tree.num_blocks == tree.num_nodes == 0


def test_unlearning_leaves_what_goes_on():
    tree = PromptTree(1)
    tree.join("a")
    feed = TtlFeed(tree, "a", 10.0, 100)
    long, short = pack([1, 2, 3, 4, 5, 6], 6), pack([1, 2, 3, 9], 4)
    feed.learn(long, "", 0.0)
    feed.learn(short, "", 1.0)
    feed.unlearn(pack([1, 2, 3], 3), "", 0)
    assert tree.match(long, "", 6)["a"].blocks == 6, "a longer one needs it"
    feed.unlearn(short, "", 3)
    assert tree.match(short, "", 4)["a"].blocks == 3
    feed.unlearn(long, "", 0)
    feed.unlearn(long, "other salt", 0)
    assert tree.match(long, "", 6) == {} and tree.num_blocks == 0
