"""Which copies a medium gives up, and which get another copy ahead of that: the least recently used first."""

from collections.abc import Callable, Iterator

from jmemserve.kvpool.address import Medium
from jmemserve.kvpool.index import TokenIndex
from jmemserve.kvpool.runs import DRAM, HBM, Node, Space


def evict(
    index: TokenIndex,
    medium: Medium,
    n: int,
    spill: Callable[[int], int],
    lossless: bool = False,
    space: Space | None = None,
) -> list[int]:
    """Take up to n unheld copies out of a medium, least recently used first, ends of prefixes first.

    For a block in HBM that has no other copy, ``spill(block)`` may name the DRAM block where its bytes go; with 0
    it can only leave at the end of a prefix, and not at all if ``lossless``. ``spill`` may evict from DRAM for
    that. Returns the locations.
    """
    gone: list[int] = []
    kept: list[Node] = []
    queue = index.queues[medium] if space is None else space.queues[medium]
    while len(gone) < n and (node := queue.pop()) is not None:
        if _shrink(index, node, medium, n - len(gone), gone, spill, lossless) and node.alive:
            queue.offer(node)
        elif lossless:
            kept.append(node)  # another call may lose what this one must not
    for node in kept:
        queue.offer(node)
    return gone


def _shrink(
    index: TokenIndex, node: Node, medium: Medium, n: int, gone: list[int], spill: Callable[[int], int], lossless: bool
) -> bool:
    """Take up to n copies from the end of one run; True if there may be more."""
    copies, others = (node.hbm, node.dram) if medium is HBM else (node.dram, node.hbm)
    sign = 1 if medium is HBM else -1
    dropped: list[int] = []
    end, taken = len(node.ids), 0
    for place in range(len(copies) - 1, -1, -1):
        if taken == n:
            break
        block = copies[place]
        if block <= 0:
            continue  # no copy, or one that is on its way
        if index.is_held(sign * block):
            break
        if not (others and others[place]):
            dram = spill(block) if medium is HBM else 0
            end = min(end, len(node.ids))  # the end of this very run may have made way in DRAM
            if dram:
                index.put_expected(node, place, dram)
                others = node.dram
            elif lossless or node.children or place != end - 1:
                break
            else:
                end = place
        elif others[place] > 0:
            index.both -= 1
        copies[place] = 0
        index.tables[medium][block] = None
        node.space.counts[medium] -= 1
        dropped.append(node.ids[place])
        gone.append(sign * block)
        taken += 1
    if index.log is not None and dropped:
        index.log.removed(medium, dropped)
    if end < len(node.ids):
        index.cut(node, end)
    elif medium is DRAM and dropped:
        index.dirty_runs.offer(node)
    return taken == n


def evict_subtrees(index: TokenIndex, medium: Medium) -> Iterator[list[int]]:
    """Forget one unheld block of this medium after the other with all that continues it, oldest first.

    For when ``evict`` finds nothing: what is not held may lie above what is.
    """
    alive = {id(node): node for node in index.tables[medium] if node is not None}
    for node in sorted(alive.values(), key=lambda node: node.last_use):
        if not node.alive:
            continue
        copies, sign = (node.hbm, 1) if medium is HBM else (node.dram, -1)
        place = next((i for i, b in enumerate(copies) if b > 0 and not index.is_held(sign * b)), None)
        if place is not None:
            yield index.truncate(node, place)


def dirty(index: TokenIndex, n: int) -> list[int]:
    """Up to n unheld HBM blocks without a copy in DRAM, least recently used first."""
    found: list[int] = []
    while len(found) < n and (node := index.dirty_runs.pop()) is not None:
        for place in range(len(node.hbm) - 1, -1, -1):
            block = node.hbm[place]
            if block and not (node.dram and node.dram[place]) and not index.is_held(block):
                found.append(block)
                if len(found) == n:
                    index.dirty_runs.offer(node)
                    break
    return found
