"""Two instances as the transfer protocol sees them: pools with all their tables, and bytes that say whose they are."""

import contextlib
from collections import deque

import numpy as np

from jmemserve.errors import PoolError
from jmemserve.kvpool import BlockAddress, BlockPool, Medium, audit
from jmemserve.kvpool import transfer as tx

C = 4  # tokens per block
TIMEOUT_S = 10.0
ALL_PARTS = (0, 1)  # a block's bytes have two halves; a whole one carries both
TO_SOURCE = tx.Accept | tx.Refuse | tx.Done | tx.Landed


class Side:
    """One instance: its pool, both machines, and what its memory holds: per half of a block, the prefix that the bytes
    stand for."""

    def __init__(
        self,
        name: str,
        num_blocks: int = 16,
        epoch: int = 1,
        max_in_flight: int = 8,
        dram_blocks: int = 0,
        quota: tuple[int | None, int | None] | None = None,
    ):
        self.name = name
        self.pool = BlockPool(name, epoch, num_blocks, C, dram_blocks, quota=quota)
        self.sender = tx.Sender(self.pool)
        self.receiver = tx.Receiver(self.pool, timeout_s=TIMEOUT_S, max_in_flight=max_in_flight)
        self.bytes: dict[tuple[Medium, int, int], tuple[int, ...] | None] = {}
        self.claimed: dict[str, list[BlockAddress]] = {}
        self.arrived: list[tx.Arrived] = []
        self.writing: list[tx.Land] = []  # begun and not over, while ``slow``
        self.slow = False

    # -- memory --------------------------------------------------------------------------------------------------------

    def put(self, address: BlockAddress, content: tuple[int, ...] | None, parts=ALL_PARTS) -> None:
        for part in parts:
            self.bytes[address.medium, address.index, part] = content

    def get(self, address: BlockAddress, parts=ALL_PARTS) -> list[tuple[int, ...] | None]:
        return [self.bytes.get((address.medium, address.index, part)) for part in parts]

    def flush(self) -> None:
        """Make the ordered copies between the media, before anything else is written."""
        for swap in self.pool.swaps.take():
            for hbm, dram in zip(swap.hbm, swap.dram, strict=True):
                for part in ALL_PARTS:
                    content = self.bytes.get((Medium.HBM, hbm, part))
                    assert swap.out, "nothing is brought back here"
                    self.bytes[Medium.DRAM, dram, part] = content
            self.pool.swaps.done(swap)

    def write(self, tokens) -> list[BlockAddress]:
        """Blocks with these tokens' contents, held."""
        addresses = self.pool.alloc_mem(-(-len(tokens) // C))
        self.flush()
        for number, address in enumerate(addresses):
            self.put(address, tuple(tokens[: (number + 1) * C]))
        return addresses

    def check(self) -> None:
        """The pool agrees with itself, and whatever can be found has its own bytes."""
        self.flush()
        self.pool.check()
        for node in audit.nodes(self.pool._index):
            raw, above = node.run, node.parent
            while above is not None:
                raw, above = above.run + raw, above.parent
            tokens = tuple(np.frombuffer(raw, np.int32).tolist())
            before = len(tokens) - len(node.hbm) * C
            for medium, copies in ((Medium.HBM, node.hbm), (Medium.DRAM, node.dram)):
                for place, block in enumerate(copies):
                    expected = tokens[: before + (place + 1) * C]
                    if block > 0:  # else it has none here, or none yet
                        got = [self.bytes.get((medium, block, part)) for part in ALL_PARTS]
                        assert got == [expected] * 2, f"{self.name}: {medium.name} {block}: {got}, not {expected}"

    # -- the protocol --------------------------------------------------------------------------------------------------

    def offer(self, tokens, to="d", now=0.0, flags=tx.Flags.CLAIM, insert=True, **kwargs) -> tx.Offer:
        """Compute these tokens, cache them, and offer them."""
        blocks = self.write(tokens)
        whole = len(tokens) // C
        self.pool.insert(tokens[: whole * C], blocks[:whole])
        kwargs.setdefault("private", repr(list(tokens)).encode())
        return self.sender.start(
            destination=to,
            tokens=tuple(tokens),
            insert=insert,
            blocks=blocks,
            now=now,
            timeout_s=TIMEOUT_S,
            flags=flags,
            **kwargs,
        )

    def handle(self, message: tx.Message, now: float, piece: int = 2) -> list[tx.Message]:
        """Do what an engine does; returns what goes to the other side."""
        match message:
            case tx.Accept() | tx.Refuse() | tx.Done() | tx.Landed():
                return self.do(self.sender.on(message, now), now, piece)
            case tx.Free():
                for address in message.addresses:
                    with contextlib.suppress(PoolError):
                        self.pool.free_mem([address], owner=message.source)
                return []
        work = self.receiver.on(message, now)
        self.flush()
        for item in work:
            if isinstance(item, tx.Send) and isinstance(item.message, tx.Accept):
                for address in item.message.addresses[item.message.have :]:
                    self.put(address, None)  # from here on anything may be in there
        return self.do(work, now, piece)

    def do(self, work, now: float, piece: int = 2) -> list[tx.Message]:
        out = []
        for item in work:
            match item:
                case tx.Send():
                    out.append(item.message)
                case tx.Ship():
                    out += self.ship(item, now, piece)
                case tx.Land():
                    if self.slow:
                        self.writing.append(item)
                    else:
                        out += self.land(item, now)
                case tx.Arrived():
                    self.arrive(item)
        return out

    def ship(self, ship: tx.Ship, now: float, piece: int) -> list[tx.Message]:
        out = []
        count = self.sender._transfers[ship.transfer_id].offer.parts
        for part in [tx.WHOLE] if count == 1 else range(count):
            for start in range(0, len(ship.sources), piece):
                sources = ship.sources[start : start + piece]
                ticket = {"bytes": [self.get(a, parts_of(part)) for a in sources]}
                first = ship.start + start
                work = self.sender.data(ship.transfer_id, first, first + len(sources), part, ticket, now)
                out += self.do(work, now, piece)
        return out

    def land(self, land: tx.Land, now: float) -> list[tx.Message]:
        """The write is over; a ticket without bytes is one that failed."""
        if land.ticket["bytes"] is None:
            return self.do(self.receiver.failed(land, "corrupt"), now)
        self.flush()
        for block, content in zip(land.blocks, land.ticket["bytes"], strict=True):
            for part, half in zip(parts_of(land.part), content, strict=True):
                self.put(block, half, [part])
        return self.do(self.receiver.landed(land, now), now)

    def arrive(self, arrived: tx.Arrived) -> None:
        assert arrived.transfer_id not in {earlier.transfer_id for earlier in self.arrived}, "arrived twice"
        self.arrived.append(arrived)
        if arrived.blocks:
            for number, block in enumerate(arrived.blocks):
                expected = arrived.tokens[: (number + 1) * C]
                assert self.get(block) == [expected] * 2, f"somebody else's bytes: {self.get(block)}, not {expected}"
            self.claimed[arrived.transfer_id] = list(arrived.blocks)

    def free_claimed(self) -> None:
        for blocks in self.claimed.values():
            self.pool.free_mem(blocks)
        self.claimed.clear()

    def check_quiet(self) -> None:
        """Nothing is under way and nobody holds anything."""
        self.free_claimed()
        self.check()
        stats = self.pool.stats()
        held = (len(self.sender), len(self.receiver), stats.hbm.held, stats.dram.held, self.pool.owned())
        assert held == (0, 0, 0, 0, {}), f"{held}, {self.pool!r}"


def parts_of(part: int) -> tuple[int, ...]:
    return ALL_PARTS if part == tx.WHOLE else (part,)


def sides(**kwargs) -> tuple[Side, Side]:
    return Side("p"), Side("d", **kwargs)


def run(p: Side, d: Side, offer: tx.Offer, now: float = 0.0) -> list[tx.Message]:
    """Deliver everything in order; returns all messages."""
    log, queue = [], deque([(d, offer)])
    while queue:
        side, message = queue.popleft()
        log.append(message)
        queue.extend((p if side is d else d, answer) for answer in side.handle(message, now))
    return log


def kinds(log) -> list[str]:
    return [type(message).__name__ for message in log]
