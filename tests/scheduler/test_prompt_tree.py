"""The prompt tree beside a dictionary of prefixes."""

from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jmemserve.kvpool import Medium
from jmemserve.kvpool.runs import pack
from jmemserve.scheduler.prompt_tree import Holding, PromptTree
from jmemserve.scheduler.stretches import PAGE_IDS, Stretches
from jmemserve.scheduler.tree_nodes import Node, Root, locate

C = 2
HBM, DRAM = Medium.HBM, Medium.DRAM
KEYS = {"": b"\0", "x": b"\0x"}


def packed(blocks):
    """One letter per block."""
    return b"".join(pack([ord(letter)] * C, C) for letter in blocks)


class Oracle:
    """Every prefix, with who has it where."""

    def __init__(self):
        self.have: dict[tuple[str, str], dict[str, set[Medium]]] = {}
        self.names: list[str] = []

    def put(self, name, medium, salt, blocks, depth):
        for stop in range(depth + 1, len(blocks) + 1):
            self.have.setdefault((salt, blocks[:stop]), {}).setdefault(name, set()).add(medium)

    def drop(self, name, media, salt, blocks, depth):
        for stop in range(depth + 1, len(blocks) + 1):
            found = self.have.get((salt, blocks[:stop]), {})
            if name in found:
                found[name] -= media
                if not found[name]:
                    del found[name]
                if not found:
                    del self.have[salt, blocks[:stop]]

    def copies(self, name):
        return sum(len(found.get(name, ())) for found in self.have.values())

    def match(self, blocks, salt):
        out = {}
        for name in self.names:
            media = []
            for stop in range(1, len(blocks) + 1):
                here = self.have.get((salt, blocks[:stop]), {}).get(name)
                if not here:
                    break
                media.append(here)
            if media:
                out[name] = Holding(len(media), sum(here == {DRAM} for here in media))
        return out


prefixes = st.text("ab", min_size=1, max_size=9)
media = st.sampled_from([HBM, DRAM])


class TreeMachine(RuleBasedStateMachine):
    """Copies come and go as pools may have them; places are remembered from when they were made."""

    @initialize(limit=st.sampled_from([1, 2, 3, 100]))
    def begin(self, limit):
        self.tree, self.oracle = PromptTree(C), Oracle()
        self.tree.run_limit = limit
        self.places: dict[tuple[str, str, str], Node] = {}  # instance, salt, prefix: where its last block is

    @rule(name=st.sampled_from("pqrstu"))
    def join_or_leave(self, name):
        if name not in self.oracle.names:
            self.tree.join(name)
            self.oracle.names.append(name)
            return
        self.tree.leave(name)
        self.oracle.names.remove(name)
        for salt, blocks in list(self.oracle.have):
            self.oracle.drop(name, {HBM, DRAM}, salt, blocks, len(blocks) - 1)
        self.places = {key: node for key, node in self.places.items() if key[0] != name}

    @rule(pick=st.integers(0, 5), medium=media, salt=st.sampled_from(["", "x"]), blocks=prefixes, at=st.integers(0, 8))
    def hold(self, pick, medium, salt, blocks, at):
        if not self.oracle.names:
            return
        name = self.oracle.names[pick % len(self.oracle.names)]
        depth = max(
            stop
            for stop in range(min(at, len(blocks) - 1) + 1)
            if not stop or (name, salt, blocks[:stop]) in self.places
        )
        tree = self.tree
        after = tree.root(KEYS[salt])
        if depth:
            after = locate(self.places[name, salt, blocks[:depth]], depth - 1)
        last, count = tree.hold(tree.slots[name], medium, after, depth, packed(blocks[depth:]))
        assert count == len(blocks) - depth
        self.oracle.put(name, medium, salt, blocks, depth)
        for stop in range(depth + 1, len(blocks) + 1):
            self.places.setdefault((name, salt, blocks[:stop]), last)

    @rule(data=st.data(), medium=st.sampled_from([HBM, DRAM, None]), size=st.integers(1, 9))
    def release(self, data, medium, size):
        if not self.places:
            return
        name, salt, blocks = data.draw(st.sampled_from(sorted(self.places)))
        low = max(0, len(blocks) - size)
        wanted = {medium} if medium is not None else {HBM, DRAM}
        here = [
            self.oracle.have[salt, blocks[:stop]].get(name, set())
            for stop in range(low + 1, len(blocks) + 1)
            if (salt, blocks[:stop]) in self.oracle.have
        ]
        has_all = len(here) == len(blocks) - low and all(medium in media for media in here)
        if medium is not None and not has_all:
            low = len(blocks) - 1
            if medium not in self.oracle.have.get((salt, blocks), {}).get(name, ()):
                node = self.places[name, salt, blocks]
                assert self.tree.release(self.tree.slots[name], medium, node, low, len(blocks)) is None
                return
        node = self.places[name, salt, blocks]
        gone = self.tree.release(self.tree.slots[name], medium, node, low, len(blocks))
        self.oracle.drop(name, wanted, salt, blocks, low)
        lost = set()
        for stop in range(low + 1, len(blocks) + 1):
            if name not in self.oracle.have.get((salt, blocks[:stop]), {}):
                lost.add(stop - 1)
                self.places.pop((name, salt, blocks[:stop]), None)
        told = {block for start, stop in gone for block in range(start, stop)}
        assert told == lost if medium is not None else told <= lost

    @rule()
    def forget(self):
        if len(self.oracle.have) > 30:
            self.tree.clear()
            self.oracle.have.clear()
            self.places.clear()

    @rule(salt=st.sampled_from(["", "x", "y"]), blocks=st.text("ab", max_size=12), limit=st.integers(0, 14))
    def match(self, salt, blocks, limit):
        found = self.tree.match(packed(blocks), salt, limit)
        truth = self.oracle.match(blocks[:limit], salt)
        assert found == truth and list(found) == list(truth)

    @invariant()
    def agrees(self):
        if not hasattr(self, "tree"):
            return
        self.tree.check()
        assert self.tree.num_blocks >= len(self.oracle.have)
        above = {(salt, blocks[:stop]) for salt, blocks in self.oracle.have for stop in range(1, len(blocks) + 1)}
        assert self.tree.num_blocks == len(above)
        for name in self.oracle.names:
            assert self.tree.slots[name].copies == self.oracle.copies(name)


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_instances_drop_out_one_by_one_and_keep_their_order():
    tree = PromptTree(C)
    names = [f"i{number}" for number in range(100)]
    for name in names:
        tree.join(name)
    for number, name in enumerate(reversed(names)):
        count = number % 50 + 1
        tree.hold(tree.slots[name], HBM, tree.root(b"\0"), 0, packed("a" * count))
    found = tree.match(packed("a" * 60), "", 60)
    assert list(found) == names
    assert all(found[name] == Holding(number % 50 + 1, 0) for number, name in enumerate(reversed(names)))
    assert tree.num_nodes == 50
    tree.leave("i0")
    tree.join("late")
    assert tree.slots["late"].bit == 1 and "late" not in tree.match(packed("a"), "", 1)
    tree.hold(tree.slots["late"], DRAM, tree.root(b"\0"), 0, packed("aa"))
    found = tree.match(packed("aaa"), "", 3)
    assert list(found) == [*names[1:], "late"] and found["late"] == Holding(2, 2)
    tree.check()


def test_a_block_in_between_that_nobody_has_ends_a_prefix():
    tree = PromptTree(C)
    tree.join("p")
    slot = tree.slots["p"]
    node, _ = tree.hold(slot, HBM, tree.root(b"\0"), 0, packed("abcd"))
    assert tree.release(slot, HBM, node, 1, 2) == [(1, 2)]
    assert tree.match(packed("abcd"), "", 4) == {"p": Holding(1, 0)} and tree.num_blocks == 4
    tree.hold(slot, DRAM, locate(node, 0), 1, packed("b"))
    assert tree.match(packed("abcd"), "", 4) == {"p": Holding(4, 1)}
    assert tree.release(slot, None, node, 0, 4) and tree.num_blocks == tree.num_nodes == 0 and not tree.roots


def test_the_tree_is_never_larger_than_it_may_be():
    tree = PromptTree(C, max_blocks=3)
    for name in "pq":
        tree.join(name)
    p, q = tree.slots["p"], tree.slots["q"]
    assert tree.hold(p, HBM, tree.root(b"\0"), 0, packed("abcde"))[1] == 3
    assert tree.hold(q, HBM, tree.root(b"\0"), 0, packed("abz"))[1] == 2
    assert tree.hold(q, HBM, tree.root(b"\0x"), 0, packed("a"))[1] == 0
    assert tree.num_blocks == 3 and list(tree.roots) == [b"\0"]
    assert tree.match(packed("abz"), "", 3) == {"p": Holding(2, 0), "q": Holding(2, 0)}
    tree.check()


# -- stretches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_stretches_are_a_dictionary(seed):
    """Ids come in runs, some of them interleaved, and go in any order; all on one long path."""
    random = Random(seed)
    path = Node(Root(b""), 0, 10**6, b"x")
    stretches, truth, following = Stretches(), {}, PAGE_IDS - 40
    for _ in range(400):
        if random.random() < 0.6:
            count, depth = random.choice((1, 1, 2, 30)), random.choice((0, 7, 1000))
            first = following
            if random.random() < 0.5 and truth:
                gaps = [one for one in range(min(truth), following) if one not in truth]
                first, count = (random.choice(gaps), 1) if gaps else (first, count)
                depth = random.choice((first, depth))
            stretches.put(first, first + count, depth, path)
            truth |= {first + place: depth + place for place in range(count)}
            following = max(following, first + count)
        elif truth:
            first = random.choice(list(truth))
            stop = first + 1
            while stop in truth and random.random() < 0.9:
                stop += 1
            stretches.drop(first, stop)
            for one in range(first, stop):
                del truth[one]
        assert stretches.num_ids == len(truth) and len(stretches) <= len(truth)
        one = random.randrange(PAGE_IDS - 60, following + 10)
        assert stretches.find(one) == ((path, truth[one]) if one in truth else None)
        stop = one + random.randrange(60)
        told = {low + i: depth + i for low, high, depth, _ in stretches.pieces(one, stop) for i in range(high - low)}
        assert told == {each: place for each, place in truth.items() if one <= each < stop}
    everything = {low + i: depth + i for low, high, depth, _ in stretches.all() for i in range(high - low)}
    assert everything == truth
    for one in list(truth):
        stretches.drop(one, one + 1)
    assert not stretches._pages


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=10))
def test_stretches_that_continue_each_other_are_one(counts):
    path = Node(Root(b""), 0, 10**6, b"x")
    stretches, at = Stretches(), 1
    for count in counts:
        stretches.put(at, at + count, at + 5, path)
        at += count
    assert len(stretches) == 1 and stretches.num_ids == at - 1
