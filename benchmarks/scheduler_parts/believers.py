"""Three ways to know which instance holds which prefix: the global tree, and two plain ones to compare it with.

Conversations have numbers and begin with the same system prompt, number 0. ``store`` and ``remove`` prepare a change as
an instance would tell it; ``take`` takes in some of them, those of one message, and only that is timed.
"""

from collections.abc import Sequence
from typing import Any

import xxhash

from jmemserve.kvpool import Medium
from jmemserve.kvpool.events import START, Removed, Snapshot, Stored
from jmemserve.kvpool.index import TokenIndex
from jmemserve.scheduler.prompt_tree import PromptTree
from jmemserve.scheduler.tree_feeds import EventFeed

BLOCK = 16
STEP = 4 * BLOCK
SYSTEM = 64  # blocks of the system prompt
SPACE = b"model\0\0"


class Believer:
    """What is compared. ``raw`` is a whole prefix, packed; ``start`` the first of its blocks that is meant."""

    def __init__(self, instances: int):
        self.names = [f"i{number}" for number in range(instances)]

    def store(self, instance: int, number: int, raw: bytes, start: int) -> Any:
        raise NotImplementedError

    def remove(self, instance: int, number: int, raw: bytes, start: int) -> Any:
        raise NotImplementedError

    def take(self, instance: int, changes: Sequence[Any]) -> bool:
        """Take in changes, in order; False if one is refused."""
        raise NotImplementedError

    def match(self, raw: bytes) -> dict[str, int]:
        """Leading blocks by instance."""
        raise NotImplementedError


class Tree(Believer):
    """The global tree, fed with the events of pools."""

    def __init__(self, instances: int):
        super().__init__(instances)
        self.tree = PromptTree(BLOCK)
        for name in self.names:
            self.tree.join(name)
        self.feeds = [EventFeed(self.tree, name) for name in self.names]
        self._following = [START + 1] * instances
        self._numbers = [0] * instances
        self._ids: list[dict[int, list[int]]] = [{} for _ in self.names]  # by conversation, after the system prompt

    def store(self, instance: int, number: int, raw: bytes, start: int) -> Any:
        count, first = len(raw) // STEP - start, self._following[instance]
        self._numbers[instance] += 1
        self._following[instance] += count
        ids = self._ids[instance].setdefault(number, [])
        new = tuple(range(first, first + count))
        if not start:
            assert new[0] == 1 and count == SYSTEM, "the system prompt is stored first"
            parent = START
        else:
            del ids[start - SYSTEM :]
            parent = ids[-1] if ids else SYSTEM
            ids += new
        return Stored(self._numbers[instance], Medium.HBM, SPACE, parent, new, raw[start * STEP :])

    def remove(self, instance: int, number: int, raw: bytes, start: int) -> Any:
        ids = self._ids[instance][number]
        self._numbers[instance] += 1
        gone = tuple(ids[start - SYSTEM : len(raw) // STEP - SYSTEM][::-1])  # a pool evicts from the end
        del ids[start - SYSTEM :]
        return Removed(self._numbers[instance], Medium.HBM, gone)

    def take(self, instance: int, changes: Sequence[Any]) -> bool:
        return self.feeds[instance].apply(changes)

    def match(self, raw: bytes) -> dict[str, int]:
        return {name: held.blocks for name, held in self.tree.match(raw, "", len(raw) // STEP).items()}

    def snapshot(self, instance: int) -> Snapshot:
        """What the instance would tell of all that it holds."""
        records, stack = [], [(child, START) for child in self.tree.roots[SPACE[6:]].children.values()]
        bit, first = self.tree.slots[self.names[instance]].bit, START + 1
        while stack:
            node, parent = stack.pop()
            if node.hbm & bit:
                ids = tuple(range(first, first + node.stop - node.start))
                first += len(ids)
                records.append(Stored(0, Medium.HBM, SPACE, parent, ids, node.run))
                stack += [(child, ids[-1]) for child in node.children.values()]
        return Snapshot(self.feeds[instance].number, tuple(records))


class Hashes(Believer):
    """A dictionary from the chained hash of a block to the set of instances that have it. Events bring the hashes."""

    def __init__(self, instances: int):
        super().__init__(instances)
        self.holders: dict[bytes, set[str]] = {}
        self._known: dict[int, list[bytes]] = {}

    def _chain(self, number: int, raw: bytes) -> list[bytes]:
        keys = self._known.setdefault(number, [])
        for at in range(len(keys) * STEP, len(raw), STEP):
            keys.append(xxhash.xxh3_128_digest((keys[-1] if keys else b"") + raw[at : at + STEP]))
        return keys[: len(raw) // STEP]

    def store(self, instance: int, number: int, raw: bytes, start: int) -> Any:
        return True, self._chain(number, raw)[start:]

    def remove(self, instance: int, number: int, raw: bytes, start: int) -> Any:
        return False, self._chain(number, raw)[start:]

    def take(self, instance: int, changes: Sequence[Any]) -> bool:
        name, holders = self.names[instance], self.holders
        for added, keys in changes:
            for key in keys:
                if added:
                    holders.setdefault(key, set()).add(name)
                else:
                    found = holders[key]
                    found.remove(name)
                    if not found:
                        del holders[key]
        return True

    def match(self, raw: bytes) -> dict[str, int]:
        found: dict[str, int] = {}
        alive, parent, depth = set(self.names), b"", 0
        for at in range(0, len(raw), STEP):
            parent = xxhash.xxh3_128_digest(parent + raw[at : at + STEP])
            left = alive & self.holders.get(parent, set())
            if len(left) < len(alive):
                found.update(dict.fromkeys(alive - left, depth))
                alive = left
                if not alive:
                    break
            depth += 1
        found.update(dict.fromkeys(alive, depth))
        return {name: blocks for name, blocks in found.items() if blocks}


class Indices(Believer):
    """The pool's index, once per instance, each asked."""

    def __init__(self, instances: int, blocks: Sequence[int]):
        super().__init__(instances)
        self.indices = [TokenIndex(BLOCK, (count, 0), lambda location: False) for count in blocks]
        self._free = [list(range(count, 0, -1)) for count in blocks]

    def store(self, instance: int, number: int, raw: bytes, start: int) -> Any:
        known = self.indices[instance].find(raw, SPACE, start)
        new = [self._free[instance].pop() for _ in range(len(raw) // STEP - start)]
        return raw, known + new

    def remove(self, instance: int, number: int, raw: bytes, start: int) -> Any:
        return raw[: (start + 1) * STEP], None

    def take(self, instance: int, changes: Sequence[Any]) -> bool:
        for raw, locations in changes:
            if locations is not None:
                self.indices[instance].insert(raw, SPACE, locations)
            else:
                self._free[instance] += self.indices[instance].remove(raw, SPACE)
        return True

    def match(self, raw: bytes) -> dict[str, int]:
        limit = len(raw) // STEP
        found = ((name, index.find(raw, SPACE, limit)) for name, index in zip(self.names, self.indices, strict=True))
        return {name: len(blocks) for name, blocks in found if blocks}
