"""How the prompt tree learns what an instance holds: from its pool's events, or from the responses it gave.

Events are the truth, a moment late: an evicted block is gone from the tree as soon as the event is there. Responses
(paper section 6) say what was computed and never what was evicted, so what they taught ends after a time. One feed is
for one instance in one life of it; it takes with it, in ``close``, all that it brought.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence

from jmemserve.kvpool.events import START, Removed, Snapshot, Stored
from jmemserve.kvpool.runs import DRAM, HBM, walk
from jmemserve.scheduler.prompt_tree import PromptTree
from jmemserve.scheduler.stretches import MAX_ID, Stretches
from jmemserve.scheduler.tree_nodes import Node, locate
from jmemserve.scheduler.waiting import Waiting

MEDIA = (HBM, DRAM)


class EventFeed:
    """Follows the events of one pool. What an event says wrongly is refused and never raises."""

    def __init__(self, tree: PromptTree, instance: str):
        self.tree, self.instance = tree, instance
        self.number = 0  # of the last event
        self.partial = False  # it holds more than is in the tree: ids that nobody knows are no mistake
        self._slot = tree.slots[instance]
        self._lost = False  # until the next snapshot
        self._known = Stretches()
        self._waiting = Waiting()

    def apply(self, events: Sequence[Stored | Removed]) -> bool:
        """Take in what is new, in order. False: something is missing or cannot be, and a snapshot is needed.

        With a gap in the numbers nothing is changed.
        """
        number = self.number
        for event in events:
            if event.number > number:
                number += 1
                if event.number != number:
                    return False
        if self._lost or self.tree.slots.get(self.instance) is not self._slot:
            return False
        for event in events:
            if event.number > self.number:
                if not (self._store(event) if isinstance(event, Stored) else self._remove(event)):
                    self._lost = True
                    return False
                self.number = event.number
        return True

    def restore(self, snapshot: Snapshot) -> None:
        """What it holds is this and nothing else (and what ``extend`` adds); events that are older say nothing new."""
        self.close()
        slot = self.tree.slots.get(self.instance)
        if slot is None:
            return
        self._slot, self._lost, self.partial, self.number = slot, False, False, snapshot.number
        self.extend(snapshot)

    def extend(self, snapshot: Snapshot) -> None:
        """Another part of the same snapshot."""
        if not self._lost:
            for record in snapshot.stored:
                if not self._store(record):
                    self.partial = True

    def close(self) -> None:
        """It holds nothing any more. In time of what it held."""
        if self.tree.slots.get(self.instance) is self._slot:
            for first, stop, depth, node in self._known.all():
                self.tree.release(self._slot, None, node, depth, depth + stop - first)
            self.tree.strip(self._slot)  # nothing, unless ids were given twice
        self._known.clear()
        self._waiting.clear()
        self._lost = True

    # -- events -------------------------------------------------------------------------------------------------------

    def _store(self, event: Stored) -> bool:
        if not self._waiting:
            return self._place(event)
        todo = [event]
        while todo:
            event = todo.pop()
            if not self._place(event):
                return False
            for one in event.ids:
                if self._known.find(one) is not None:
                    todo += self._waiting.take(one)
        return True

    def _place(self, event: Stored) -> bool:
        """Credit the blocks of one record, if its parent is known."""
        ids, count = event.ids, len(event.ids)
        if not ids or len(event.tokens) != count * self.tree.step or event.medium not in MEDIA:
            return False
        first, runs = ids[0], None
        fresh = first > self._known.highest and (count == 1 or ids == tuple(range(first, first + count)))
        if not fresh:
            runs = _consecutive(ids)
            if runs is None or first <= START:
                return False
        if ids[-1] >= MAX_ID:
            return False
        if event.parent == START:
            node: Node = self.tree.root(event.space.partition(b"\0")[2])
            depth = 0
        else:
            found = self._known.find(event.parent)
            if found is not None:
                node, depth = found[0], found[1] + 1
            elif (found := self._known.find(ids[0])) is not None and found[1]:  # a block that has a copy already
                node, depth = locate(found[0], found[1] - 1), found[1]
            else:
                return self._wait(event)
            if not node.start < depth <= node.stop:
                return False
        last, held = self.tree.hold(self._slot, event.medium, node, depth, event.tokens)
        if held < count:
            self.partial = True
        if runs is None:
            if held:
                self._known.append(first, first + held, depth, last)
            return True
        return self._name(runs, depth, depth + held, last)

    def _name(self, runs: Sequence[tuple[int, int]], depth: int, stop: int, last: Node) -> bool:
        """Ids, some of which may be known, are the blocks from ``depth`` to ``stop``. False if one is another block."""
        for first, end in runs:
            end = min(end, first + stop - depth)
            if first >= end:
                break
            upto = end
            for low, high, place, where in self._known.pieces(first, end):
                if place - low != depth - first or locate(where, place) is not locate(last, place):
                    return False
                if high < upto:
                    self._known.put(high, upto, depth + high - first, last)
                upto = low
            if first < upto:
                self._known.put(first, upto, depth, last)
            depth += end - first
        return True

    def _wait(self, event: Stored) -> bool:
        """The block before has no copy now, or was left out: hold back what comes after it."""
        if self.partial:
            return True
        if event.parent >= event.ids[0] or any(self._known.find(one) is not None for one in event.ids):
            return False
        if not self._waiting.add(event, self.tree.step):
            self.partial = True
            self._waiting.clear()
        return True

    def _remove(self, event: Removed) -> bool:
        if not event.ids or event.medium not in MEDIA:
            return False
        if len(event.ids) == 1 and (place := self._known.find(event.ids[0])) is not None:
            found = self.tree.release(self._slot, event.medium, place[0], place[1], place[1] + 1)
            if found:
                self._known.drop(event.ids[0], event.ids[0] + 1)
            return found is not None
        runs = _consecutive(event.ids) or _consecutive(tuple(sorted(event.ids)))
        if runs is None:
            return False
        for first, stop in reversed(runs):
            known, count = self._known.pieces(first, stop), 0
            for low, high, depth, node in known:
                count += high - low
                gone = self.tree.release(self._slot, event.medium, node, depth, depth + high - low)
                if gone is None:
                    return False
                for start, end in gone:
                    self._known.drop(low + start - depth, low + end - depth)
            if count < stop - first and not self._missing(first, stop, known, event):
                return False
        return True

    def _missing(self, first: int, stop: int, known: Sequence[tuple[int, int, int, Node]], event: Removed) -> bool:
        """Ids without a place lost a copy: right, if they were waiting or left out."""
        if self.partial:
            return True
        here = {one for low, high, _, _ in known for one in range(low, high)}
        if not self._waiting or stop - first - len(here) > len(self._waiting):
            return False
        return all(one in here or self._waiting.remove(one, event.medium) for one in range(first, stop))


def _consecutive(ids: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """Rising ids as stretches (first, after the last). None if they do not rise."""
    first, count = ids[0], len(ids)
    if count == 1:
        return [(first, first + 1)]
    if ids[-1] - first == count - 1 and ids == tuple(range(first, first + count)):
        return [(first, first + count)]
    if first > ids[-1]:
        return None
    runs, start, before = [], first, first
    for one in ids[1:]:
        if one != before + 1:
            if one <= before:
                return None
            runs.append((start, before + 1))
            start = one
        before = one
    runs.append((start, before + 1))
    return runs


@dataclasses.dataclass(slots=True)
class _Lesson:
    """A response has shown that the instance has the blocks up to ``stop`` on the way to ``node``."""

    time: float
    node: Node
    stop: int


class TtlFeed:
    """Believes what responses taught, each block for ``ttl_s`` after its last lesson, and at most ``max_blocks``.

    Times are ``now`` of one monotonic clock, in seconds. A lesson teaches a prefix with all of its blocks, so none is
    older than what continues it.
    """

    # Invariant: a block is held as long as the newest lesson that has it, and that one is in the queue.

    def __init__(self, tree: PromptTree, instance: str, ttl_s: float, max_blocks: int):
        assert ttl_s > 0 and max_blocks >= 1, f"{ttl_s=}, {max_blocks=}"
        self.tree, self.instance, self.ttl_s, self.max_blocks = tree, instance, ttl_s, max_blocks
        self._slot = tree.slots[instance]
        self._lessons: deque[_Lesson] = deque()  # oldest first

    def learn(self, raw: bytes, salt: str, now: float) -> None:
        """The instance has the whole blocks of this prompt, packed (of a very long one: as many as it may have)."""
        tree = self.tree
        count = min(len(raw) // tree.step, self.max_blocks)
        if not self._is_current() or not count:
            return
        if self._lessons:
            now = max(now, self._lessons[-1].time)
        root = tree.root(b"\0" + salt.encode())
        node, count = tree.hold(self._slot, HBM, root, 0, raw[: count * tree.step], now)
        if count:
            self._lessons.append(_Lesson(now, node, count))
        while self._slot.copies > self.max_blocks:
            self._forget_oldest(self._slot.copies - self.max_blocks)
        if len(self._lessons) > 2 * self._slot.copies + 64:
            self._compact()

    def unlearn(self, raw: bytes, salt: str, kept: int) -> None:
        """The instance has none of this packed prompt beyond the first ``kept`` blocks, but for what others go on with.

        Whatever taught it.
        """
        tree = self.tree
        root: Node | None = tree.roots.get(b"\0" + salt.encode())
        if root is None or not self._is_current():
            return
        path = walk(root, raw, 0, len(raw) // tree.step * tree.step, tree.step)
        while path and not path[-1][0].hbm & self._slot.bit:
            path.pop()
        if not path:
            return
        node, stop = path[-1][0], path[-1][0].start + path[-1][1]
        while stop > kept:
            node = locate(node, stop - 1)
            if node.stop != stop or any(child.hbm & self._slot.bit for child in node.children.values()):
                return  # it is taught further
            start = max(node.start, kept)
            tree.release(self._slot, HBM, node, start, stop)
            stop = start

    def expire(self, now: float) -> None:
        """Forget what nothing has taught for so long."""
        if self._is_current():
            while self._lessons and now - self._lessons[0].time >= self.ttl_s:
                self._forget_oldest(self._slot.copies)

    def close(self) -> None:
        """It holds nothing any more. In time of what it held."""
        if self._is_current():
            while self._lessons:
                self._forget_oldest(self._slot.copies)
            self.tree.strip(self._slot)
        self._lessons.clear()

    def _is_current(self) -> bool:
        """After the tree was cleared begin anew; False if the instance has left it."""
        slot = self.tree.slots.get(self.instance)
        if slot is not None and slot is not self._slot:
            self._slot = slot
            self._lessons.clear()
        return slot is not None

    def _forget_oldest(self, limit: int) -> None:
        """Drop up to ``limit`` blocks that no later lesson has, from the end of the oldest lesson's prefix."""
        slot = self._slot
        lesson = self._lessons.popleft()
        node, stop = lesson.node, lesson.stop
        while stop:
            node = locate(node, stop - 1)
            if node.stop != stop or node.times is None or node.times.get(slot) != lesson.time:
                return  # taught later too, or a lesson of the same time goes on here
            if any(child.hbm & slot.bit for child in node.children.values()):
                return
            if not limit:
                self._lessons.appendleft(_Lesson(lesson.time, node, stop))
                return
            start = max(node.start, stop - limit)
            self.tree.release(slot, HBM, node, start, stop)
            limit -= stop - start
            stop = start

    def _compact(self) -> None:
        """Leave out lessons whose end was taught again since."""
        kept: dict[tuple[int, int], _Lesson] = {}
        for lesson in self._lessons:
            node = lesson.node = locate(lesson.node, lesson.stop - 1)
            if lesson.stop <= node.stop and node.times is not None and node.times.get(self._slot) == lesson.time:
                kept[id(node), lesson.stop] = lesson
        self._lessons = deque(kept.values())
