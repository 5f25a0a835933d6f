"""What a radix tree of blocks is made of: runs of whole blocks, the walk along them, and the spaces of the index.

The pool's index and the front-end's prompt tree are the same tree with other things at its nodes.
"""

import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import numpy as np

from jmemserve.errors import InvalidTokens
from jmemserve.kvpool.address import Medium
from jmemserve.kvpool.eviction import EvictionQueue

TOKEN_BYTES = 4  # token ids are below 2**31
HBM, DRAM = Medium.HBM, Medium.DRAM
OF_ALL = (1, 2)  # bits of the eviction queues, by medium
OF_SPACE = (4, 8)
DIRTY = 16


def pack(tokens: Sequence[int] | np.ndarray, count: int) -> bytes:
    """The first ``count`` tokens as int32 in native order. Raises InvalidTokens for what is no id of int32."""
    head = tokens[:count]
    if isinstance(head, np.ndarray):
        if head.dtype != np.int32:
            if head.dtype.kind not in "iu" or len(head) and not -(2**31) <= head.min() <= head.max() < 2**31:
                raise InvalidTokens(f"token ids are whole numbers of int32, not an array of {head.dtype} beyond that")
            head = head.astype(np.int32)
        raw = head.tobytes()
    else:
        try:
            raw = struct.pack(f"{len(head)}i", *head)
        except struct.error as error:
            raise InvalidTokens(f"token ids are whole numbers of int32; {error}") from None
    assert len(raw) == count * TOKEN_BYTES, f"{len(tokens)=} < {count=}"
    return raw


class Run(Protocol):
    """A node of a radix tree: the tokens of its blocks, and what continues them, by the tokens of the first block."""

    @property
    def run(self) -> bytes: ...

    @property
    def children(self) -> Mapping[bytes, Self]: ...


def walk[R: Run](node: R, raw: bytes, at: int, end: int, step: int) -> list[tuple[R, int]]:
    """The nodes below ``node`` along the longest known prefix of ``raw[at:end]``, and how many blocks of each.

    ``step`` is bytes per block. Whole runs are compared at once.
    """
    path: list[tuple[R, int]] = []
    while at < end:
        child = node.children.get(raw[at : at + step])
        if child is None:
            break
        run = child.run
        if len(run) <= end - at and raw.startswith(run, at):
            path.append((child, len(run) // step))
            at += len(run)
            node = child
            continue
        path.append((child, shared_blocks(raw, at, end, run, 0, step)))
        break
    return path


def shared_blocks(raw: bytes, at: int, end: int, run: bytes, start: int, step: int) -> int:
    """How many whole blocks of ``raw[at:end]`` are the same as those of ``run[start:]``."""
    low, high = 0, min(len(run) - start, end - at) // step
    while low < high:
        middle = (low + high + 1) // 2
        if raw[at + low * step : at + middle * step] == run[start + low * step : start + middle * step]:
            low = middle
        else:
            high = middle - 1
    return low


class Space:
    """The prefixes that may meet: those of one model, adapter and cache salt. Counts are blocks in the index."""

    __slots__ = ("counts", "name", "queues", "root")

    def __init__(self, name: bytes):
        self.name = name
        self.counts = [0, 0]  # by medium
        self.queues: list[EvictionQueue[Node]] = [EvictionQueue(bit) for bit in OF_SPACE]
        self.root = Node(None, self, b"")


class Node:
    """A run of whole blocks below its parent; a root has an empty one."""

    __slots__ = ("alive", "children", "dram", "hbm", "ids", "last_use", "parent", "queued", "run", "space", "used_at")

    def __init__(self, parent: "Node | None", space: Space, run: bytes):
        self.parent = parent
        self.space = space
        self.run = run  # tokens
        self.hbm: list[int] = []  # block of each, or 0
        self.dram: list[int] = []  # the same, or minus a block that is on its way; empty if all are 0
        self.ids: array[int] = array("q")
        self.children: dict[bytes, Node] = {}  # by the first block's tokens
        self.last_use = 0
        self.used_at = 0.0
        self.queued = 0
        self.alive = True


def block_keys(tokens: Sequence[int] | np.ndarray, block_size: int, num_blocks: int) -> list[bytes]:
    """The tokens of the first ``num_blocks`` whole blocks, one key each."""
    raw, step = pack(tokens, num_blocks * block_size), block_size * TOKEN_BYTES
    return [raw[start : start + step] for start in range(0, len(raw), step)]
