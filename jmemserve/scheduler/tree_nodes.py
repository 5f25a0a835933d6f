"""What the prompt tree is made of, and how a place in it is remembered while its runs split and merge."""

from collections.abc import Iterable, Iterator

from jmemserve.kvpool.runs import TOKEN_BYTES

RUN_BYTES = 1 << 15  # of one node, about: to grow, shorten or split it copies so much at most


class Slot:
    """An instance in one life of it: the bit of a mask that stands for it, which another may have later."""

    __slots__ = ("bit", "copies", "index", "name", "order")

    def __init__(self, name: str, index: int, order: int):
        self.name = name
        self.index = index
        self.bit = 1 << index
        self.order = order  # of joining
        self.copies = 0  # blocks that it holds, counted once per medium


class Node:
    """A run of whole blocks, ``start`` to ``stop`` from the root, and who has all of them in HBM and in DRAM.

    A root has an empty run and nobody. Somewhere above what is held, a run may be held by nobody: its copies are on
    their way.
    """

    __slots__ = ("children", "dram", "hbm", "into", "parent", "run", "start", "stop", "times")

    def __init__(self, parent: "Node | None", start: int, stop: int, run: bytes):
        self.parent = parent
        self.start = start
        self.stop = stop
        self.run = run  # tokens; a node that has left the tree has none
        self.hbm = 0  # mask
        self.dram = 0  # mask
        self.times: dict[Slot, float] | None = None  # of instances that are known from responses: the last one
        self.children: dict[bytes, Node] = {}  # by the first block's tokens
        self.into: Node | None = None  # the child that this one has become a part of

    def alike(self, other: "Node") -> bool:
        """Whether both have the same to say of their blocks."""
        return self.hbm == other.hbm and self.dram == other.dram and self.times == other.times


class Root(Node):
    """Of the prefixes that may meet."""

    __slots__ = ("key",)

    def __init__(self, key: bytes):
        super().__init__(None, 0, 0, b"")
        self.key = key


def locate(node: Node, block: int) -> Node:
    """Where a block is that was in this node, or above it, when the node was remembered.

    Splits leave the lower part its identity, so the way is up, or on to whatever a node was merged into. If nobody has
    the block any more, some node that lacks it.
    """
    while True:
        while node.into is not None:
            node = node.into
        if node.start <= block or node.parent is None:
            return node
        node = node.parent


def run_limit(block_size: int) -> int:
    """How many blocks one node may have."""
    return max(1, RUN_BYTES // (block_size * TOKEN_BYTES))


def nodes(roots: Iterable[Root]) -> Iterator[Node]:
    """Every run, parents first."""
    for root in roots:
        stack = list(root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()
