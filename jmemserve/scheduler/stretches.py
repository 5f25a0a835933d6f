"""Where blocks are that others know by number: a map from ids to places in the prompt tree, by stretches.

Ids are given out in rising order, so those of a prompt follow each other, and so do their places: a stretch says it
of all of them at once. Stretches lie in pages of so many ids, so that what changes is never a long list.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator

from jmemserve.scheduler.tree_nodes import Node, locate

PAGE_IDS = 4096
MAX_ID = 2**62


class _Page:
    """Stretches whose ids have the same id // PAGE_IDS, by rising ids."""

    __slots__ = ("depths", "firsts", "nodes", "stops")

    def __init__(self) -> None:
        self.firsts = array("q")
        self.stops = array("q")  # id after the last one
        self.depths = array("q")  # place of the first one
        self.nodes: list[Node] = []  # of the last one, or below it: see ``tree_nodes.locate``


class Stretches:
    """Ids and places of one instance. Places are blocks from the root; a node is found again by ``locate``."""

    def __init__(self) -> None:
        self._pages: dict[int, _Page] = {}
        self.num_ids = 0
        self.highest = 0  # id that was ever known

    def __len__(self) -> int:
        return sum(len(page.firsts) for page in self._pages.values())

    def find(self, one: int) -> tuple[Node, int] | None:
        """The node and the place of a block."""
        page = self._pages.get(one // PAGE_IDS)
        if page is None:
            return None
        at = bisect_right(page.firsts, one) - 1
        if at < 0 or one >= page.stops[at]:
            return None
        place = page.depths[at] + one - page.firsts[at]
        node = page.nodes[at]
        if node.into is not None or node.start > place:
            node = locate(node, place)
            if one == page.stops[at] - 1:
                page.nodes[at] = node  # the way is short the next time
        return node, place

    def append(self, first: int, stop: int, depth: int, node: Node) -> None:
        """As ``put``, of ids above all that were ever known."""
        page = self._pages.get(first // PAGE_IDS)
        if page is None or stop > (first // PAGE_IDS + 1) * PAGE_IDS:
            self.put(first, stop, depth, node)
            return
        self.num_ids += stop - first
        self.highest = stop - 1
        if page.stops[-1] == first and self._continues(page, -1, depth, node):
            page.stops[-1], page.nodes[-1] = stop, node
        else:
            page.firsts.append(first)
            page.stops.append(stop)
            page.depths.append(depth)
            page.nodes.append(node)

    def put(self, first: int, stop: int, depth: int, node: Node) -> None:
        """Ids ``first`` to ``stop``, all new, are the blocks from ``depth`` on, the last in ``node`` or above."""
        self.num_ids += stop - first
        self.highest = max(self.highest, stop - 1)
        while first < stop:
            number = first // PAGE_IDS
            end = min(stop, (number + 1) * PAGE_IDS)
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = _Page()
            at = bisect_right(page.firsts, first)
            if at and page.stops[at - 1] == first and self._continues(page, at - 1, depth, node):
                at -= 1
                page.stops[at], page.nodes[at] = end, node
            else:
                page.firsts.insert(at, first)
                page.stops.insert(at, end)
                page.depths.insert(at, depth)
                page.nodes.insert(at, node)
            if at + 1 < len(page.firsts) and page.firsts[at + 1] == end:
                if self._continues(page, at, page.depths[at + 1], page.nodes[at + 1]):
                    page.stops[at], page.nodes[at] = page.stops[at + 1], page.nodes[at + 1]
                    self._drop(page, at + 1)
            depth += end - first
            first = end

    @staticmethod
    def _continues(page: _Page, at: int, depth: int, node: Node) -> bool:
        """Whether a stretch ends right above the block at ``depth`` on the way to ``node``."""
        if page.depths[at] + page.stops[at] - page.firsts[at] != depth:
            return False
        return locate(page.nodes[at], depth - 1) is locate(node, depth - 1)

    def pieces(self, first: int, stop: int) -> list[tuple[int, int, int, Node]]:
        """What is known of these ids, highest first: (first id, id after the last one, place of the first, node)."""
        found = []
        while first < stop:
            number = (stop - 1) // PAGE_IDS
            page = self._pages.get(number)
            bottom = max(first, number * PAGE_IDS)
            if page is not None:
                at = bisect_right(page.firsts, stop - 1) - 1
                while at >= 0 and page.stops[at] > bottom:
                    low, high = max(bottom, page.firsts[at]), min(stop, page.stops[at])
                    if low < high:
                        found.append((low, high, page.depths[at] + low - page.firsts[at], page.nodes[at]))
                    at -= 1
            stop = bottom
        return found

    def drop(self, first: int, stop: int) -> None:
        """Forget these ids; all of them are known."""
        self.num_ids -= stop - first
        while first < stop:  # once, mostly
            number = first // PAGE_IDS
            page = self._pages[number]
            at = bisect_right(page.firsts, first) - 1
            start, end = page.firsts[at], page.stops[at]
            upto = min(stop, end)
            assert start <= first < end, f"{first=} is not among {start}..{end}"
            if upto < end:
                if start < first:
                    page.firsts.insert(at + 1, upto)
                    page.stops.insert(at + 1, end)
                    page.depths.insert(at + 1, page.depths[at] + upto - start)
                    page.nodes.insert(at + 1, page.nodes[at])
                    page.stops[at] = first
                else:
                    page.depths[at] += upto - start
                    page.firsts[at] = upto
            elif start < first:
                page.stops[at] = first
            else:
                self._drop(page, at)
                if not page.firsts:
                    del self._pages[number]
            first = upto

    @staticmethod
    def _drop(page: _Page, at: int) -> None:
        del page.firsts[at], page.stops[at], page.depths[at], page.nodes[at]

    def all(self) -> Iterator[tuple[int, int, int, Node]]:
        """Every stretch, as ``pieces`` has them."""
        for page in self._pages.values():
            yield from zip(page.firsts, page.stops, page.depths, page.nodes, strict=True)

    def clear(self) -> None:
        self._pages.clear()
        self.num_ids = self.highest = 0
