"""Which instance is believed to hold the keys and values of which prefix.

A tree with one node per whole block, as in ``kvpool.index``; each node says which instances had the block and when.
Belief is best effort: instances do not report what they evict, so an entry ends after ``ttl_s``, and the tree never
has more than ``max_blocks`` nodes: the oldest leave first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from jmemserve.kvpool import block_keys


class _Node:
    """One whole block of tokens below its parent; a root has neither parent nor holders."""

    __slots__ = ("children", "holders", "key", "parent")

    def __init__(self, parent: "_Node | None", key: bytes):
        self.parent = parent
        self.key = key
        self.children: dict[bytes, _Node] = {}
        self.holders: dict[str, float] = {}  # instance -> when it last had the block, in seconds


class PromptTree:
    """Prefixes of prompts and their holders. Times are ``now`` of one monotonic clock, in seconds, never falling."""

    def __init__(self, block_size: int, max_blocks: int, ttl_s: float):
        assert block_size >= 1 and max_blocks >= 1 and ttl_s > 0, f"{block_size=}, {max_blocks=}, {ttl_s=}"
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._ttl_s = ttl_s
        self._roots: dict[bytes, _Node] = {}  # by salt; none is without children
        # Invariant: every node, with the time of its last insert, oldest first, and children before their parent; so
        # the first one is always a leaf.
        self._nodes: OrderedDict[_Node, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def insert(self, tokens: Sequence[int], instance: str, now: float, salt: str = "") -> None:
        """The instance has the whole blocks of ``tokens`` (as many of the first ones as the tree may have nodes)."""
        count = min(len(tokens) // self._block_size, self._max_blocks)
        if count:
            self._insert_keys(salt.encode(), block_keys(tokens, self._block_size, count), instance, now)

    def _insert_keys(self, root: bytes, keys: Iterable[bytes], instance: str, now: float) -> None:
        node = self._roots.get(root)
        if node is None:
            node = self._roots[root] = _Node(None, root)
        path = []
        for key in keys:
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = _Node(node, key)
            child.holders[instance] = now
            path.append(child)
            node = child
        for node in reversed(path):
            self._nodes[node] = now
            self._nodes.move_to_end(node)
        self._expire(now)
        while len(self._nodes) > self._max_blocks:
            self._remove(next(iter(self._nodes)))

    def match(self, tokens: Sequence[int], now: float, salt: str = "") -> dict[str, int]:
        """How many of the first tokens each instance is believed to hold: whole blocks, never the last token."""
        self._expire(now)
        node = self._roots.get(salt.encode())
        found: dict[str, int] = {}
        if node is None:
            return found
        depth = 0
        for key in block_keys(tokens, self._block_size, max(0, len(tokens) - 1) // self._block_size):
            node = node.children.get(key)
            if node is None:
                break
            fresh = [name for name, time in node.holders.items() if now - time < self._ttl_s]
            # A prefix without a gap: who lacks a block is not looked at below it.
            reached = [name for name in fresh if found.get(name, 0) == depth]
            if not reached:
                break
            depth += self._block_size
            found.update(dict.fromkeys(reached, depth))
        return found

    def remove_instance(self, instance: str) -> None:
        """The instance holds nothing any more."""
        for node in list(self._nodes):  # children come before their parent
            node.holders.pop(instance, None)
            if not node.holders and not node.children:
                self._remove(node)

    def move(self, instance: str, to: "PromptTree") -> None:
        """The instance and all it holds belong into another tree from now on."""
        for node in reversed(list(self._nodes)):  # parents first, so that a longer path renews a shorter one
            time = node.holders.get(instance)
            if time is None or any(instance in child.holders for child in node.children.values()):
                continue  # not the end of a path
            keys = []
            place: _Node | None = node
            while place is not None and place.parent is not None:
                keys.append(place.key)
                place = place.parent
            assert place is not None
            to._insert_keys(place.key, keys[::-1], instance, time)
        self.remove_instance(instance)

    def clear(self) -> None:
        """Forget everything."""
        self._roots.clear()
        self._nodes.clear()

    def _expire(self, now: float) -> None:
        while self._nodes:
            node, time = next(iter(self._nodes.items()))
            if now - time < self._ttl_s:
                break
            self._remove(node)

    def _remove(self, node: _Node) -> None:
        parent = node.parent
        assert parent is not None and not node.children, f"only leaves are removed, not one with {len(node.children)}"
        del self._nodes[node]
        del parent.children[node.key]
        if parent.parent is None and not parent.children:
            del self._roots[parent.key]

    def check(self) -> None:
        """Assert the invariants. Slow: for tests."""
        order = {node: position for position, node in enumerate(self._nodes)}
        count = 0
        for salt, root in self._roots.items():
            assert root.children and root.key == salt, f"the root of salt {salt!r} is empty"
            stack = [root]
            while stack:
                node = stack.pop()
                for key, child in node.children.items():
                    assert child.key == key and child.parent is node, f"a wrong parent or key at {key!r}"
                    assert node is root or order[child] < order[node], f"{order[child]=} is not before {order[node]=}"
                    assert child.holders, "a node without holders"
                    count += 1
                    stack.append(child)
        assert count == len(order) <= self._max_blocks, f"{count=}, {len(order)=}, {self._max_blocks=}"
