"""From tokens to blocks: a tree with one node per whole block.

    salt "" root ── [5 1 7 2] ── [9 9 4 0] ── [3 3 1 8]
                             └── [9 9 6 6]

A node is found by its parent and the exact tokens of its block, so two prefixes never meet by a hash, and nothing
depends on the hash seed of a process. A node is never split, so a pin on a block stays on that block. Blocks without
references may be evicted, the least recently used leaf first.
"""

import heapq
import struct
from collections.abc import Callable, Iterator, Sequence

import numpy as np

_NOBODY = 0  # the block of a root
_UNQUEUED = -1
_TOKEN_BYTES = 4  # token ids are below 2**31


def block_keys(tokens: Sequence[int] | np.ndarray, block_size: int, num_blocks: int) -> list[bytes]:
    """The keys of the first ``num_blocks`` whole blocks of ``tokens``. Raises struct.error for ids beyond int32."""
    head = tokens[: num_blocks * block_size]
    if isinstance(head, np.ndarray):
        raw = head.astype(np.int32).tobytes()
    else:
        raw = struct.pack(f"{len(head)}i", *head)  # half the time of array or numpy
    assert len(raw) == num_blocks * block_size * _TOKEN_BYTES, f"{len(tokens)=} < {num_blocks=} * {block_size=}"
    step = block_size * _TOKEN_BYTES
    return [raw[start : start + step] for start in range(0, len(raw), step)]


class Node:
    """One whole block of tokens below its parent."""

    __slots__ = ("block", "children", "key", "last_use", "parent", "queued")

    def __init__(self, parent: "Node | None", key: bytes, block: int):
        self.parent = parent  # None: a root, or a node that was removed
        self.key = key
        self.block = block  # _NOBODY: a root
        self.children: dict[bytes, Node] = {}
        self.last_use = 0
        self.queued = _UNQUEUED  # last_use as written on its entry in the eviction queue, if it has one


class TokenIndex:
    """Prefixes of whole blocks and the block behind each. ``is_held(block)`` tells what must not be evicted."""

    def __init__(self, block_size: int, capacity: int, is_held: Callable[[int], bool]):
        self._block_size = block_size
        self._is_held = is_held
        self._roots: dict[bytes, Node] = {}  # by salt; none is without children
        self._nodes: list[Node | None] = [None] * (capacity + 1)  # by block
        self._queue: list[tuple[int, int, Node]] = []  # heap of (last_use, push number, node), some out of date
        self._clock = 0
        self._pushes = 0
        self.num_nodes = 0

    def __contains__(self, block: int) -> bool:
        return self._nodes[block] is not None

    def find(self, tokens: Sequence[int] | np.ndarray, salt: str, limit: int) -> list[int]:
        """The blocks of the longest known prefix, at most ``limit`` of them. Changes nothing."""
        node = self._roots.get(salt.encode())
        if node is None or limit <= 0:
            return []
        blocks: list[int] = []
        for key in block_keys(tokens, self._block_size, limit):
            node = node.children.get(key)
            if node is None:
                break
            blocks.append(node.block)
        return blocks

    def insert(self, tokens: Sequence[int] | np.ndarray, salt: str, blocks: Sequence[int]) -> list[int]:
        """Name the i-th whole block of tokens ``blocks[i]``; return the positions that have another block already."""
        if not blocks:
            return []
        root = salt.encode()
        node = self._roots.get(root)
        if node is None:
            node = self._roots[root] = Node(None, root, _NOBODY)
        self._clock += 1
        duplicates = []
        for position, key in enumerate(block_keys(tokens, self._block_size, len(blocks))):
            child = node.children.get(key)
            block = blocks[position]
            if child is None:
                assert self._nodes[block] is None, f"block {block} is in the index under other tokens"
                child = Node(node, key, block)
                node.children[key] = child
                self._nodes[block] = child
                self.num_nodes += 1
            elif child.block != block:
                duplicates.append(position)
            child.last_use = self._clock  # its entry in the queue, if any, is put right when it comes up
            node = child
        return duplicates

    def unheld(self, block: int) -> None:
        """The block of the index lost its last reference just now: it is the most recently used."""
        node = self._nodes[block]
        assert node is not None, f"block {block} is not in the index"
        self._clock += 1
        node.last_use = self._clock
        self._offer(node)

    def pop_oldest_leaf(self) -> int | None:
        """Remove the least recently used leaf that nobody holds and return its block, or None."""
        while self._queue:
            last_use, _, node = heapq.heappop(self._queue)
            if node.queued != last_use or node.parent is None:
                continue  # an entry of a node that was removed
            node.queued = _UNQUEUED
            if node.last_use != last_use:
                self._offer(node)
            elif not node.children and not self._is_held(node.block):
                return self._remove(node)[0]
        return None

    def pop_oldest_subtrees(self) -> Iterator[list[int]]:
        """Remove one unheld node after the other with all below it, oldest first, and yield the blocks of each.

        For when ``pop_oldest_leaf`` finds nothing: blocks that are not held may lie above blocks that are.
        """
        nodes = [node for node in self._nodes if node is not None and not self._is_held(node.block)]
        nodes.sort(key=lambda node: node.last_use)
        for node in nodes:
            if node.parent is not None:
                yield self._remove(node)

    def remove(self, tokens: Sequence[int] | np.ndarray, salt: str) -> list[int]:
        """Remove the node of this prefix of whole blocks and all below it; return their blocks, parents first."""
        count = len(tokens) // self._block_size
        path = self.find(tokens, salt, count)
        if not path or len(path) < count:
            return []
        node = self._nodes[path[-1]]
        assert node is not None
        return self._remove(node)

    def remove_all(self) -> list[int]:
        """Remove every node and return their blocks."""
        nodes = [node for node in self._nodes if node is not None]
        for node in nodes:
            node.parent = None
            self._nodes[node.block] = None
        self._roots.clear()
        self._queue.clear()
        self.num_nodes = 0
        return [node.block for node in nodes]

    def _remove(self, node: Node) -> list[int]:
        parent = node.parent
        assert parent is not None, f"the node of block {node.block} was removed before"
        del parent.children[node.key]
        blocks = []
        stack = [node]
        while stack:
            lost = stack.pop()
            blocks.append(lost.block)
            self._nodes[lost.block] = None
            lost.parent = None
            stack.extend(lost.children.values())
        self.num_nodes -= len(blocks)
        if parent.block != _NOBODY:
            self._offer(parent)
        elif not parent.children:
            del self._roots[parent.key]
        return blocks

    def _offer(self, node: Node) -> None:
        """Queue the node for eviction if it can be evicted now. Invariant: each such node has one valid entry."""
        if node.queued != _UNQUEUED or node.children or self._is_held(node.block):
            return
        if len(self._queue) > 2 * len(self._nodes):  # entries of removed nodes; let go of them
            self._queue = [entry for entry in self._queue if entry[2].parent is not None]
            heapq.heapify(self._queue)
        self._pushes += 1
        node.queued = node.last_use
        heapq.heappush(self._queue, (node.last_use, self._pushes, node))

    def check(self) -> set[int]:
        """Assert that the tree, the table by block and the eviction queue agree; return the blocks in the index."""
        queued = {id(node) for last_use, _, node in self._queue if node.queued == last_use and node.parent is not None}
        seen: set[int] = set()
        for salt, root in self._roots.items():
            assert root.children and root.key == salt, f"the root of salt {salt!r} is empty"
            stack = [root]
            while stack:
                node = stack.pop()
                for key, child in node.children.items():
                    assert child.key == key and child.parent is node, f"block {child.block} has a wrong parent or key"
                    assert len(key) == self._block_size * _TOKEN_BYTES, f"{len(key)=}, {self._block_size=}"
                    assert child.block not in seen, f"block {child.block} is in the index twice"
                    assert self._nodes[child.block] is child, f"block {child.block} is missing in the table"
                    assert child.queued == _UNQUEUED or id(child) in queued, f"block {child.block} lost its queue entry"
                    if not child.children and not self._is_held(child.block):
                        assert child.queued != _UNQUEUED, f"block {child.block} could be evicted but is not queued"
                    seen.add(child.block)
                    stack.append(child)
        listed = sum(node is not None for node in self._nodes)
        assert len(seen) == listed == self.num_nodes, f"{len(seen)=}, {listed=}, {self.num_nodes=}"
        return seen
