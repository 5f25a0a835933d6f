"""Which instance holds the keys and values of which prefix: one radix tree over all instances (paper section 6).

    root ── [0 ....... 40) ──┬── [40 .. 47)                 numbers are blocks from the root
            hbm   a b c      │   hbm  . b .
            dram  . b .      └── [40 ......... 90) ── [90 ... 96)
                                 hbm  a . .           hbm  . . .
                                 dram . . c           dram . . c

It is the tree of the pools' index (``kvpool.runs.walk``) whose nodes have, instead of block numbers, two masks: a bit
for each instance that has all of the run in HBM, and in DRAM. The tree of one kind of instances is this tree seen
through the mask of that kind. Runs split where masks come to differ and merge where they have become equal, so there
are as many nodes as there are differences, not blocks.

A prefix is held as far as every block of it is, so a match walks once and takes instances off one mask as they drop
out: it costs as much as there are nodes on the way and instances in the answer. ``tree_feeds`` fill the tree; they
remember places as (node, block), see ``tree_nodes.locate``.
"""

import heapq
import itertools
from typing import NamedTuple

from jmemserve.kvpool.address import Medium
from jmemserve.kvpool.runs import DRAM, HBM, TOKEN_BYTES, shared_blocks, walk
from jmemserve.scheduler import tree_audit
from jmemserve.scheduler.tree_nodes import Node, Root, Slot, locate, nodes, run_limit

MAX_BLOCKS = 1 << 23
DECODED_MASKS = 1024  # whose instances are remembered


class Holding(NamedTuple):
    """What an instance holds of a prompt."""

    blocks: int  # leading blocks, in any medium
    dram: int  # of these, only in DRAM


class PromptTree:
    """Prefixes of whole blocks and who holds them. Beyond ``max_blocks`` it learns nothing new."""

    # Invariant: every leaf has a bit in a mask; no only child is like its parent unless both together are too long.

    def __init__(self, block_size: int, max_blocks: int = MAX_BLOCKS):
        assert block_size >= 1 and max_blocks >= 1, f"{block_size=}, {max_blocks=}"
        self.step = block_size * TOKEN_BYTES
        self.run_limit = run_limit(block_size)
        self.max_blocks = max_blocks
        self.num_blocks = 0  # prefixes of whole blocks
        self.num_nodes = 0
        self.roots: dict[bytes, Root] = {}  # by adapter and cache salt; none is empty between calls
        self.slots: dict[str, Slot] = {}  # in the order of joining
        self._taken: list[Slot | None] = []  # by bit
        self._free: list[int] = []  # bits that had an instance, a heap
        self._orders = itertools.count()
        self._names: dict[int, tuple[str, ...]] = {}  # of masks

    # -- instances ----------------------------------------------------------------------------------------------------

    def join(self, instance: str) -> None:
        """The instance may hold blocks from now on."""
        assert instance not in self.slots, f"{instance} has joined already"
        if not self._free:
            self._free.append(len(self._taken))
            self._taken.append(None)
        slot = Slot(instance, heapq.heappop(self._free), next(self._orders))
        self._taken[slot.index] = self.slots[instance] = slot
        self._names.clear()

    def leave(self, instance: str) -> None:
        """The instance holds nothing any more. Cheap once its feed is closed; else a look at the whole tree."""
        slot = self.slots.pop(instance)
        self.strip(slot)
        self._taken[slot.index] = None
        heapq.heappush(self._free, slot.index)
        self._names.clear()

    def strip(self, slot: Slot) -> None:
        """Take everything from an instance, whatever its feed believes. Slow unless it has nothing."""
        if slot.copies:
            for node in [node for node in nodes(self.roots.values()) if (node.hbm | node.dram) & slot.bit]:
                self.release(slot, None, node, node.start, node.stop)

    def clear(self) -> None:
        """Forget everything. Feeds have to be restored."""
        self.roots.clear()
        self.num_blocks = self.num_nodes = 0
        for name, old in list(self.slots.items()):
            self._taken[old.index] = self.slots[name] = Slot(name, old.index, old.order)

    # -- looking ------------------------------------------------------------------------------------------------------

    def match(self, raw: bytes, salt: str, blocks: int) -> dict[str, Holding]:
        """What each instance holds of the first ``blocks`` blocks of a prompt, packed (``kvpool.runs.pack``).

        Only of those that hold at least one, in the order of joining.
        """
        root: Node | None = self.roots.get(b"\0" + salt.encode())
        end = min(blocks, len(raw) // self.step) * self.step
        if root is None or end <= 0:
            return {}
        path = walk(root, raw, 0, end, self.step)
        if not path:
            return {}
        out: dict[str, Holding] | None = None
        spilled: dict[int, int] = {}  # bit -> blocks only in DRAM
        first = path[0][0]
        alive = everyone = first.hbm | first.dram
        only = depth = 0
        for node, count in path:
            if gone := alive & ~(node.hbm | node.dram):
                left = alive ^ gone
                if out is None:
                    out = dict.fromkeys(self._instances(everyone), Holding(depth, 0))
                else:  # who is left is written again later: choose what is known or small
                    some = gone if gone.bit_count() < left.bit_count() else alive
                    out.update(dict.fromkeys(self._instances(some), Holding(depth, 0)))
                alive = left
            if only or node.dram:
                now = node.dram & ~node.hbm & alive
                self._count(spilled, now & ~only, -depth)
                self._count(spilled, only & ~now, depth)
                only = now
            if not alive:
                break
            depth += count
        self._count(spilled, only, depth)
        if out is None:
            out = dict.fromkeys(self._instances(everyone), Holding(depth, 0))
        elif alive:
            out.update(dict.fromkeys(self._instances(alive), Holding(depth, 0)))
        for bit, count in spilled.items():
            slot = self._taken[bit.bit_length() - 1]
            assert slot is not None, f"{bit=} is nobody's"
            out[slot.name] = Holding(out[slot.name].blocks, count)
        return out

    @staticmethod
    def _count(spilled: dict[int, int], mask: int, blocks: int) -> None:
        while mask:
            bit = mask & -mask
            spilled[bit] = spilled.get(bit, 0) + blocks
            mask ^= bit

    def _instances(self, mask: int) -> tuple[str, ...]:
        """The names of a mask, in the order of joining."""
        names = self._names.get(mask)
        if names is None:
            slots, rest = [], mask
            while rest:
                bit = rest & -rest
                slot = self._taken[bit.bit_length() - 1]
                assert slot is not None, f"{bit=} is nobody's"
                slots.append(slot)
                rest ^= bit
            if len(self._names) >= DECODED_MASKS:
                self._names.clear()
            slots.sort(key=lambda slot: slot.order)
            names = self._names[mask] = tuple([slot.name for slot in slots])
        return names

    # -- learning -----------------------------------------------------------------------------------------------------

    def root(self, key: bytes) -> Root:
        """Where the prefixes of an adapter and cache salt begin. Made if need be: ``hold`` something below it."""
        root = self.roots.get(key)
        if root is None:
            root = self.roots[key] = Root(key)
        return root

    def hold(
        self, slot: Slot, medium: Medium, after: Node, depth: int, raw: bytes, now: float | None = None
    ) -> tuple[Node, int]:
        """The instance has the blocks of ``raw`` in a medium. They come after the first ``depth`` blocks on the way to
        ``after``, which has the last of these.

        Returns how many it is now known to have (all, unless the tree is full), and where the last one is. ``now``: the
        time of a response that shows it.
        """
        bit, step, end = slot.bit, self.step, len(raw)
        hbm, dram = (bit, 0) if medium is HBM else (0, bit)
        if depth == after.stop and not after.children and after.hbm == hbm and after.dram == dram and now is None:
            more = end // step
            stop = depth + more
            if stop - after.start <= self.run_limit and self.num_blocks + more <= self.max_blocks and not after.times:
                after.run += raw  # decoding does nothing else
                after.stop = stop
                self.num_blocks += more
                slot.copies += more
                return after, more
        times = None if now is None else {slot: now}
        path: list[tuple[Node, int, int]] = []
        reached, at = depth, 0
        if depth < after.stop:
            reached += shared_blocks(raw, 0, end, after.run, (depth - after.start) * step, step)
            at = (reached - depth) * step
            if at:
                path.append((after, depth, reached))
        if reached == after.stop and at < end and after.children:
            for node, count in walk(after, raw, at, end, step):
                path.append((node, node.start, node.start + count))
                at += count * step
        touched: list[Node] = []
        last = after
        for last, low, reached in path:
            has = (last.hbm & hbm) == hbm and (last.dram & dram) == dram
            if has and (now is None or (last.times is not None and last.times.get(slot) == now)):
                continue
            last = self._isolate(last, low, reached, touched)
            if not has:
                slot.copies += reached - low
                last.hbm |= hbm
                last.dram |= dram
            if now is not None:
                last.times = last.times or {}
                last.times[slot] = now
        if at < end and self.num_blocks < self.max_blocks:
            if reached < last.stop:
                last = self._cut(last, reached, touched)
            more = min((end - at) // step, self.max_blocks - self.num_blocks)
            slot.copies += more
            last = self._append(last, raw[at : at + more * step], hbm, dram, times)
            reached += more
        elif isinstance(after, Root) and not after.children:
            del self.roots[after.key]
        if touched:
            self._merge(touched)
        return last, reached - depth

    def _append(self, node: Node, raw: bytes, hbm: int, dram: int, times: dict[Slot, float] | None) -> Node:
        """New blocks at the end of a node; returns the node of the last one."""
        step, at = self.step, 0
        self.num_blocks += len(raw) // step
        while at < len(raw):
            room = self.run_limit - (node.stop - node.start)
            if node.run and not node.children and room > 0:
                grows = node.hbm == hbm and node.dram == dram and node.times == times
            else:
                grows = False
            part = raw[at : at + (room if grows else self.run_limit) * step]
            if grows:
                node.run += part
                node.stop += len(part) // step
            else:
                child = Node(node, node.stop, node.stop + len(part) // step, part)
                child.hbm, child.dram, child.times = hbm, dram, None if times is None else dict(times)
                node.children[part[:step]] = child
                self.num_nodes += 1
                node = child
            at += len(part)
        return node

    # -- forgetting ---------------------------------------------------------------------------------------------------

    def release(
        self, slot: Slot, medium: Medium | None, node: Node, low: int, high: int
    ) -> list[tuple[int, int]] | None:
        """The instance has lost its copies of blocks ``low`` to ``high`` on the way to ``node`` (None: all it has).

        Returns the stretches of which it has none left, the end first. None if it did not have all of them in the
        medium; then nothing above that place is changed.
        """
        gone: list[tuple[int, int]] = []
        while low < high:
            node = locate(node, high - 1)
            hbm = node.hbm & slot.bit if medium is not DRAM else 0
            dram = node.dram & slot.bit if medium is not HBM else 0
            if not (hbm or dram) or high > node.stop:
                if medium is not None:
                    return None
                high = min(high, node.stop) if hbm or dram else min(high - 1, node.start)
                continue
            above, bottom = node.parent, max(low, node.start)
            assert above is not None, "a root is held by nobody"
            slot.copies -= (high - bottom) * (2 if hbm and dram else 1)
            hbm, dram = node.hbm ^ hbm, node.dram ^ dram
            if not (hbm | dram) & slot.bit:
                gone.append((bottom, high))
            if hbm or dram or node.children or high < node.stop:
                touched: list[Node] = []
                node = self._isolate(node, bottom, high, touched)
                node.hbm, node.dram = hbm, dram
                if node.times is not None and not (hbm | dram) & slot.bit:
                    node.times.pop(slot, None)
                    node.times = node.times or None
                self._merge(touched)
            else:
                self._shorten(node, bottom)
            node, high = above, bottom
        return gone

    def _shorten(self, node: Node, stop: int) -> None:
        """A leaf ends there; with nothing left of it, it goes, and what is held by nobody above it."""
        self.num_blocks -= node.stop - stop
        key = node.run[: self.step] if stop == node.start else b""
        node.run, node.stop = node.run[: (stop - node.start) * self.step], stop
        while node.start == node.stop:
            above = node.parent
            assert above is not None, "a root is no leaf"
            del above.children[key]
            self.num_nodes -= 1
            node = above
            if isinstance(node, Root):
                if not node.children:
                    del self.roots[node.key]
                return
            if node.children or node.hbm or node.dram:
                break
            key = node.run[: self.step]
            self.num_blocks -= node.stop - node.start
            node.run, node.stop = b"", node.start
        self._merge([node])

    # -- splitting and merging ----------------------------------------------------------------------------------------

    def _isolate(self, node: Node, low: int, high: int, touched: list[Node]) -> Node:
        """Make blocks ``low`` to ``high`` of a node a node of their own."""
        touched.append(node)
        if high < node.stop:
            node = self._cut(node, high, touched)
        if low > node.start:
            self._cut(node, low, touched)
        return node

    def _cut(self, node: Node, block: int, touched: list[Node]) -> Node:
        """Split a run; the new node is the upper part, so that who remembers ``node`` finds both."""
        above, place = node.parent, (block - node.start) * self.step
        assert above is not None and node.start < block < node.stop, f"{node.start} < {block} < {node.stop}"
        upper = Node(above, node.start, block, node.run[:place])
        upper.hbm, upper.dram = node.hbm, node.dram
        upper.times = None if node.times is None else dict(node.times)
        above.children[upper.run[: self.step]] = upper
        node.parent, node.start, node.run = upper, block, node.run[place:]
        upper.children[node.run[: self.step]] = node
        self.num_nodes += 1
        touched += (upper, node)
        return upper

    def _merge(self, touched: list[Node]) -> None:
        """Join these with their neighbours where nothing tells them apart any more."""
        for node in touched:
            above = node.parent
            if above is None or node.into is not None or not node.run:
                continue
            if len(above.children) == 1 and above.run:
                self._try_merge(above, node)
            if len(node.children) == 1:
                self._try_merge(node, next(iter(node.children.values())))

    def _try_merge(self, upper: Node, lower: Node) -> None:
        if upper.alike(lower) and lower.stop - upper.start <= self.run_limit:
            above = upper.parent
            assert above is not None, "a root is like nobody"
            lower.parent, lower.start, lower.run = above, upper.start, upper.run + lower.run
            above.children[lower.run[: self.step]] = lower
            upper.into, upper.run, upper.children, upper.times = lower, b"", {}, None
            self.num_nodes -= 1

    def check(self) -> None:
        """Assert the invariants. Slow: for tests."""
        tree_audit.check(self)
