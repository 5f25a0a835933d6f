"""From tokens to blocks: a radix tree whose edges are runs of whole blocks (paper section 4.2).

    space ── [5 1 7 2|9 9 4 0] ──┬── [3 3 1 8|6 6 0 2|1 1 1 1]        "|" parts the blocks of a run
             hbm  4   9          │    hbm 12   7   0
             dram 0   3          │    dram 0   0   5
                                 └── [8 8 8 8] ...

Every block of a run has a copy in HBM, in DRAM or in both; in the lists 0 means no copy there, and a negative number
in ``dram`` a copy whose bytes are still on their way and that nobody can find. Runs split where prefixes part, between
blocks; what is held is blocks, never nodes, so a split changes nothing for who holds. Tokens are compared exactly, so
two prefixes never meet by a hash, and nothing depends on the hash seed of a process.

A *location* is a block number with its medium: b > 0 is HBM block b, -b is DRAM block b.
"""

import itertools
from array import array
from collections.abc import Callable, Iterable, Sequence

from jmemserve.kvpool.address import Medium
from jmemserve.kvpool.events import START, EventLog
from jmemserve.kvpool.eviction import EvictionQueue
from jmemserve.kvpool.runs import DIRTY, DRAM, HBM, OF_ALL, TOKEN_BYTES, Node, Space, walk


class TokenIndex:
    """Prefixes of whole blocks and where the copies of each block are. ``is_held(location)``: it must stay."""

    def __init__(
        self,
        block_size: int,
        capacities: tuple[int, int],
        is_held: Callable[[int], bool],
        log: EventLog | None = None,
        quota: tuple[int | None, int | None] | None = None,
    ):
        self.step = block_size * TOKEN_BYTES
        self.is_held = is_held
        self.log = log
        self.quota = quota  # cached blocks that each space may have, by medium
        self.spaces: dict[bytes, Space] = {}  # none is empty
        self.tables: list[list[Node | None]] = [[None] * (capacity + 1) for capacity in capacities]  # by medium, block
        self.queues: list[EvictionQueue[Node]] = [EvictionQueue(bit) for bit in OF_ALL]
        self.dirty_runs: EvictionQueue[Node] = EvictionQueue(DIRTY)  # may have blocks in HBM without a copy in DRAM
        self._has_dram = capacities[DRAM] > 0
        self._ids = itertools.count(START + 1)
        self.clock = 0  # of uses; raised once per call of the pool
        self.now = 0.0  # in seconds, set by the pool's owner; only for people
        self.both = 0  # blocks with a copy in either medium
        self.num_blocks = 0  # prefixes of whole blocks, wherever their copies are
        self.num_nodes = 0

    # -- looking -----------------------------------------------------------------------------------------------------

    def __contains__(self, location: int) -> bool:
        return (self.tables[HBM][location] if location > 0 else self.tables[DRAM][-location]) is not None

    def find(self, raw: bytes, space: bytes, limit: int) -> list[int]:
        """Locations of the longest prefix that has all its bytes in place, at most ``limit`` blocks; HBM first."""
        found: list[int] = []
        for node, count in self._walk(raw, space, limit):
            if not node.dram:
                found += node.hbm if count == len(node.hbm) else node.hbm[:count]
                continue
            for place in range(count):
                location = node.hbm[place] or -node.dram[place]
                if location == 0 or (location > 0 and not node.hbm[place]):
                    return found  # its only copy is on its way
                found.append(location)
        return found

    def _walk(self, raw: bytes, space: bytes, limit: int) -> list[tuple[Node, int]]:
        """The nodes along the longest known prefix and how many blocks of each."""
        known = self.spaces.get(space)
        if known is None:
            return []
        return walk(known.root, raw, 0, min(limit * self.step, len(raw)), self.step)

    # -- storing -----------------------------------------------------------------------------------------------------

    def insert(self, raw: bytes, space: bytes, locations: Sequence[int]) -> list[int]:
        """Block i of ``raw`` has its bytes at ``locations[i]``; return the places that have another copy already.

        Raises ValueError, changing nothing, if a location is in the index under other tokens.
        """
        path = self._walk(raw, space, len(locations))
        self._check_new(path, locations)
        duplicates: list[int] = []
        done = 0
        for node, count in path:
            self._use(node)
            for place in range(count):
                location = locations[done + place]
                medium, block = (HBM, location) if location > 0 else (DRAM, -location)
                copies = node.hbm if medium is HBM else node.dram
                here = copies[place] if copies else 0
                if here == 0:
                    self.attach(node, place, location)
                elif here != block:
                    duplicates.append(done + place)
            done += count
        if done < len(locations):
            self._extend(path, raw[done * self.step : len(locations) * self.step], space, locations[done:])
        return duplicates

    def validate(self, raw: bytes, space: bytes, locations: Sequence[int]) -> None:
        """Raise ValueError if ``insert`` would."""
        self._check_new(self._walk(raw, space, len(locations)), locations)

    def _check_new(self, path: list[tuple[Node, int]], locations: Sequence[int]) -> None:
        """No location may stand for two prefixes."""
        new: list[int] = []
        done = 0
        for node, count in path:
            for place in range(count):
                location = locations[done + place]
                if location not in self:
                    new.append(location)
                elif location != node.hbm[place] and not (node.dram and -location == node.dram[place]):
                    raise ValueError(f"block {location} is in the index under other tokens")
            done += count
        new += locations[done:]
        hbm, dram = self.tables
        if len(set(new)) < len(new) or any([(hbm[b] if b > 0 else dram[-b]) is not None for b in new]):
            raise ValueError(f"blocks {new} are in the index under other tokens, or given twice")

    def insert_after(self, before: int, raw: bytes, space: bytes, locations: Sequence[int]) -> bool:
        """Continue the prefix that ends with the block at ``before``; False if that cannot be told from here."""
        node = self.tables[HBM][before] if before > 0 else None
        if node is None or node.hbm[-1] != before or node.children or node.space.name != space:
            return False
        if any(location in self for location in locations) or len(set(locations)) < len(locations):
            return False
        self._use(node)
        self._extend([(node, len(node.hbm))], raw, space, locations)
        return True

    def _extend(self, path: list[tuple[Node, int]], raw: bytes, name: bytes, locations: Sequence[int]) -> None:
        """Add a run of new blocks below the end of ``path``."""
        space = self.spaces.get(name)
        if space is None:
            space = self.spaces[name] = Space(name)
        parent, count = path[-1] if path else (space.root, 0)
        if count < len(parent.hbm):
            self._split(parent, count)
        before = parent.ids[-1] if parent.ids else START
        ids = array("q", itertools.islice(self._ids, len(locations)))
        if parent.parent is not None and not parent.children:
            node = parent  # a leaf grows
            node.run += raw
        else:
            node = Node(parent, space, raw)
            parent.children[raw[: self.step]] = node
            self.num_nodes += 1
        first = len(node.hbm)
        node.ids += ids
        in_dram = [-location if location < 0 else 0 for location in locations] if min(locations) < 0 else []
        node.hbm += [max(location, 0) for location in locations] if in_dram else locations
        if node.dram or in_dram:
            node.dram += [0] * (first - len(node.dram)) + (in_dram or [0] * len(locations))
        self.num_blocks += len(locations)
        hbm, dram = self.tables
        for location in locations:
            if location > 0:
                hbm[location] = node
            else:
                dram[-location] = node
        num_dram = len(in_dram) - in_dram.count(0)
        space.counts[HBM] += len(locations) - num_dram
        space.counts[DRAM] += num_dram
        if self.log is not None and not in_dram:
            self.log.stored(Medium.HBM, name, before, ids, raw[: len(locations) * self.step])
        elif self.log is not None:
            for medium, stretch in itertools.groupby(range(len(locations)), lambda i: int(locations[i] < 0)):
                places = list(stretch)
                start, stop = places[0], places[-1] + 1
                parent_id = ids[start - 1] if start else before
                tokens = raw[start * self.step : stop * self.step]
                self.log.stored(Medium(medium), name, parent_id, ids[start:stop], tokens)
        self._use(node)
        self.offer(node)

    def attach(self, node: Node, place: int, location: int) -> None:
        """A block that has a copy elsewhere, or had, gets this one."""
        medium, block = (HBM, location) if location > 0 else (DRAM, -location)
        if medium is DRAM and not node.dram:
            node.dram = [0] * len(node.hbm)
        copies = node.hbm if medium is HBM else node.dram
        assert copies[place] in (0, -block), f"{copies[place]=} has another copy than {block=}"
        copies[place] = block
        self.tables[medium][block] = node
        node.space.counts[medium] += 1
        self.both += bool(node.hbm[place] and node.dram and node.dram[place] > 0)
        if self.log is not None:
            parent_id = node.ids[place - 1] if place else self.before(node)
            tokens = node.run[place * self.step : (place + 1) * self.step]
            self.log.stored(medium, node.space.name, parent_id, node.ids[place : place + 1], tokens)
        self.offer(node)

    def before(self, node: Node) -> int:
        """The id of the block before a run."""
        assert node.parent is not None
        return node.parent.ids[-1] if node.parent.ids else START

    def _split(self, node: Node, place: int) -> None:
        """Cut a run in two; ``node`` keeps the first ``place`` blocks."""
        cut = place * self.step
        tail = Node(node, node.space, node.run[cut:])
        tail.hbm, tail.dram, tail.ids = node.hbm[place:], node.dram[place:], node.ids[place:]
        tail.children, tail.last_use, tail.used_at = node.children, node.last_use, node.used_at
        for child in tail.children.values():
            child.parent = tail
        node.run, node.hbm, node.dram, node.ids = node.run[:cut], node.hbm[:place], node.dram[:place], node.ids[:place]
        node.children = {tail.run[: self.step]: tail}
        self.num_nodes += 1
        for copies, nodes in zip((tail.hbm, tail.dram), self.tables, strict=True):
            for block in copies:
                if block:
                    nodes[abs(block)] = tail
        self.offer(node)
        self.offer(tail)

    # -- copies on their way -----------------------------------------------------------------------------------------

    def expect(self, block: int, dram: int) -> None:
        """The bytes of this HBM block are on their way to this DRAM block."""
        node = self.tables[HBM][block]
        assert node is not None, f"HBM block {block} is not in the index"
        self.put_expected(node, node.hbm.index(block), dram)

    def put_expected(self, node: Node, place: int, dram: int) -> None:
        if not node.dram:
            node.dram = [0] * len(node.hbm)
        assert node.dram[place] == 0, f"HBM block {node.hbm[place]} has the DRAM copy {node.dram[place]}"
        node.dram[place] = -dram
        self.tables[DRAM][dram] = node
        self.offer(node)  # the copy in HBM may go now, whatever continues it

    def arrived(self, dram: int) -> list[int]:
        """The bytes of a DRAM block that was expected are in place.

        Nothing happens if its prefix was forgotten meanwhile; without room in the quota, they are lost. Returns
        locations that left the index.
        """
        node = self.tables[DRAM][dram]
        if node is None:
            return []
        if self._is_full(node.space, DRAM):
            return self.lost(dram)
        self.attach(node, node.dram.index(-dram), -dram)
        return []

    def lost(self, dram: int) -> list[int]:
        """The bytes will never come. Returns locations that left the index with it."""
        node = self.tables[DRAM][dram]
        if node is None:
            return []
        place = node.dram.index(-dram)
        node.dram[place] = 0
        self.tables[DRAM][dram] = None
        if not node.hbm[place]:
            return self.truncate(node, place)
        self.offer(node)
        return []

    def swapped_in(self, dram: int, block: int) -> bool:
        """An HBM block has the bytes of this DRAM block; False if the prefix has a copy in HBM or is forgotten."""
        node = self.tables[DRAM][dram]
        if node is None or self._is_full(node.space, HBM) or node.hbm[place := node.dram.index(dram)]:
            return False
        self.attach(node, place, block)
        return True

    def _is_full(self, space: Space, medium: Medium) -> bool:
        limit = self.quota[medium] if self.quota is not None else None
        return limit is not None and space.counts[medium] >= limit

    def released(self, location: int) -> None:
        """The block of the index lost its last reference, an order's: that is no use of its prefix."""
        node = self.tables[HBM][location] if location > 0 else self.tables[DRAM][-location]
        assert node is not None, f"block {location} is not in the index"
        self.offer(node)

    def released_all(self, nodes: Iterable[Node | None]) -> None:
        """Blocks of these runs lost their last references just now."""
        last = None
        for node in nodes:
            if node is not last and node is not None:
                self._use(node)
                self.offer(node)
                last = node

    def cut(self, node: Node, place: int) -> None:
        """Shorten a run whose copies from ``place`` on are gone."""
        self.num_blocks -= len(node.ids) - place
        key = node.run[: self.step]
        node.run = node.run[: place * self.step]
        del node.hbm[place:], node.dram[place:], node.ids[place:]
        if place:
            self.offer(node)
            return
        parent = node.parent
        assert parent is not None, "a root has no blocks"
        del parent.children[key]
        node.parent, node.alive = None, False
        self.num_nodes -= 1
        if parent.parent is not None:
            self.offer(parent)
        elif not parent.children:
            del self.spaces[node.space.name]

    def truncate(self, node: Node, place: int) -> list[int]:
        """Forget a run from ``place`` on and all below it; return the locations whose bytes were in place."""
        gone: list[int] = []
        stack = list(node.children.values())
        node.children = {}
        self._strip(node, place, gone)
        while stack:
            lost = stack.pop()
            stack += lost.children.values()
            self._strip(lost, 0, gone)
            self.num_blocks -= len(lost.ids)
            self.num_nodes -= 1
            lost.parent, lost.alive, lost.children = None, False, {}
        self.cut(node, place)
        return gone

    def _strip(self, node: Node, start: int, gone: list[int]) -> None:
        """Take every copy from ``start`` on out of the tables."""
        for medium, copies, sign in ((HBM, node.hbm, 1), (DRAM, node.dram, -1)):
            dropped = []
            for place in range(start, len(copies)):
                block = copies[place]
                if block:
                    self.tables[medium][abs(block)] = None
                if block > 0:
                    gone.append(sign * block)
                    dropped.append(node.ids[place])
                    self.both -= bool(medium is HBM and node.dram and node.dram[place] > 0)
            node.space.counts[medium] -= len(dropped)
            if self.log is not None and dropped:
                self.log.removed(medium, dropped)

    def remove(self, raw: bytes, space: bytes) -> list[int]:
        """Forget this prefix of whole blocks and all that continues it; return the locations. Unknown: nothing."""
        count = len(raw) // self.step
        path = self._walk(raw, space, count)
        if not path or sum(found for _, found in path) < count:
            return []
        node, found = path[-1]
        return self.truncate(node, found - 1)

    def forget(self, location: int) -> list[int]:
        """Forget the block at this location and all that continues it; return the locations."""
        node = self.tables[location < 0][abs(location)]
        if node is None:
            return []
        return self.truncate(node, node.hbm.index(location) if location > 0 else node.dram.index(-location))

    def remove_all(self) -> list[int]:
        """Forget every prefix and return the locations."""
        gone: list[int] = []
        for space in list(self.spaces.values()):
            for node in list(space.root.children.values()):
                gone += self.truncate(node, 0)
        return gone

    def _use(self, node: Node) -> None:
        node.last_use, node.used_at = self.clock, self.now

    def offer(self, node: Node) -> None:
        """Queue a node wherever something of it might be given up."""
        if node.parent is None:
            return
        self.queues[HBM].offer(node)
        if self._has_dram:
            self.queues[DRAM].offer(node)
            self.dirty_runs.offer(node)
        if self.quota is not None:
            for queue in node.space.queues:
                queue.offer(node)
