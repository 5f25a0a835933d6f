"""The whole index at once: as a snapshot for readers of its events, and recomputed from scratch for tests."""

import itertools
from collections.abc import Iterator

from jmemserve.kvpool.events import Stored
from jmemserve.kvpool.index import TokenIndex
from jmemserve.kvpool.runs import DRAM, HBM, Node


def nodes(index: TokenIndex) -> Iterator[Node]:
    """Every run, parents first."""
    for space in index.spaces.values():
        stack = list(space.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()


def snapshot(index: TokenIndex) -> tuple[Stored, ...]:
    """All that is cached, as the records that would have stored it, parents first."""
    records = []
    for node in nodes(index):
        dram = node.dram or [0] * len(node.hbm)
        there = [(hbm > 0, copy > 0) for hbm, copy in zip(node.hbm, dram, strict=True)]
        for media, stretch in itertools.groupby(range(len(there)), there.__getitem__):
            places = list(stretch)
            start, stop = places[0], places[-1] + 1
            before = node.ids[start - 1] if start else index.before(node)
            ids, tokens = tuple(node.ids[start:stop]), node.run[start * index.step : stop * index.step]
            for medium in (HBM, DRAM):
                if media[medium]:
                    records.append(Stored(0, medium, node.space.name, before, ids, tokens))
    return tuple(records)


def check(index: TokenIndex) -> tuple[set[int], set[int]]:
    """Assert that tree, tables, counts and queues agree; return the blocks in the index by medium."""
    seen: tuple[set[int], set[int]] = (set(), set())
    blocks = both = num_nodes = 0
    counts = {space.name: [0, 0] for space in index.spaces.values()}
    for node in nodes(index):
        num_nodes += 1
        size = len(node.ids)
        blocks += size
        assert size > 0 and len(node.run) == size * index.step, f"{size=}, {len(node.run)=}"
        assert len(node.hbm) == size and len(node.dram) in (0, size), f"{len(node.hbm)=}, {len(node.dram)=}, {size=}"
        assert node.alive and node.parent is not None, "a dead node is in the tree"
        assert node.parent.children.get(node.run[: index.step]) is node, "a child has a wrong key"
        assert list(node.ids) == sorted(set(node.ids)), f"ids are not rising: {node.ids}"
        for place in range(size):
            hbm, dram = node.hbm[place], node.dram[place] if node.dram else 0
            assert hbm > 0 or dram != 0, f"a block of the index has no copy: {hbm=}, {dram=}"
            both += bool(hbm and dram > 0)
            for medium, block in ((HBM, hbm), (DRAM, abs(dram))):
                if block:
                    assert block not in seen[medium], f"{medium.name} block {block} is in the index twice"
                    assert index.tables[medium][block] is node, f"{medium.name} block {block} has a wrong node"
                    seen[medium].add(block)
            counts[node.space.name][HBM] += hbm > 0
            counts[node.space.name][DRAM] += dram > 0
        _check_queued(index, node)
    for medium in (HBM, DRAM):
        listed = sum(node is not None for node in index.tables[medium])
        assert listed == len(seen[medium]), f"{medium.name}: {listed=}, {len(seen[medium])=}"
    actual = (blocks, both, num_nodes)
    assert actual == (index.num_blocks, index.both, index.num_nodes), f"{actual=}"
    for space in index.spaces.values():
        assert space.root.children, f"space {space.name!r} is empty"
        assert space.counts == counts[space.name], f"{space.counts=}, {counts[space.name]=}"
    return seen


def _check_queued(index: TokenIndex, node: Node) -> None:
    """A run whose last copy could be given up waits in the queue of that medium, or for a copy to be written back."""
    last = len(node.ids) - 1
    for medium, copies, others, sign in ((HBM, node.hbm, node.dram, 1), (DRAM, node.dram, node.hbm, -1)):
        block = copies[last] if copies else 0
        if block > 0 and not index.is_held(sign * block) and (not node.children or (others and others[last])):
            assert node in index.queues[medium], f"{medium.name} block {block} could be evicted but is not queued"
            if index.quota is not None:
                assert node in node.space.queues[medium], f"{medium.name} block {block} is not queued in its space"
    if index.tables[DRAM][1:] and node not in index.dirty_runs:
        for block, dram in itertools.zip_longest(node.hbm, node.dram, fillvalue=0):
            assert not block or dram or index.is_held(block), f"HBM block {block} is not queued for a copy"
