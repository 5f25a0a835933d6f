"""PoolNode: one pool among others. It owns what moves bytes and speaks the transfer protocol with its peers.

    verbs ──▶ BlockPool decides ──▶ Swapper, Shipper: enqueue reads ──▶ workers wait, publish, fetch ──▶ post(...)
    handle(peer, message) ──▶ Sender, Receiver decide ──▶ Shipper, Lander

Every method is called from one thread, the owner's: an instance's, or that of a ``MemPool``. Workers come back to it
through ``post``. Nothing here waits; verbs that take time return a future. ``poll`` does what time demands, and needs
no other traffic to be called.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from jmemserve.errors import CorruptBlock, PoolError, TransferError, UnknownInstance
from jmemserve.kvpool import transfer as tx
from jmemserve.kvpool.address import BlockAddress, Medium
from jmemserve.kvpool.arena import HostArena
from jmemserve.kvpool.blocks import BlockPool
from jmemserve.kvpool.node.access import read_blocks, write_blocks
from jmemserve.kvpool.node.landing import Lander
from jmemserve.kvpool.node.moving import Transfer, check_private, check_transfer, settle
from jmemserve.kvpool.node.peers import Peer, Peers
from jmemserve.kvpool.node.remote import Remote
from jmemserve.kvpool.node.shipping import Shipper
from jmemserve.kvpool.node.swapper import Swapper
from jmemserve.kvpool.node.tally import Tally
from jmemserve.kvpool.stats import NodeStats
from jmemserve.kvpool.store import PageStore
from jmemserve.kvpool.swaps import WRITE_BACK_BELOW, WRITE_BACK_BLOCKS, Swap
from jmemserve.kvpool.transfer import Flags, Granularity
from jmemserve.kvpool.transports import Transport

TIMEOUT_S = 30.0  # of each state of a transfer without a sign of life
LEASE_S = 30.0  # of blocks allocated for a peer, without a Renew from it


class PoolNode:
    """``send(peer, message)`` must not block; ``on_arrival`` gets what comes with a private part or for the owner, and
    raises TransferError, having freed the blocks, if it does not take it: the source hears of it."""

    def __init__(
        self,
        blocks: BlockPool,
        store: PageStore,
        arena: HostArena | None,
        transports: Sequence[Transport],
        post: Callable[[Callable[[], None]], None],
        send: Callable[[str, tx.Message], None],
        on_arrival: Callable[[tx.Arrived], None] = lambda arrived: None,
        timeout_s: float = TIMEOUT_S,
        lease_s: float = LEASE_S,
        granularity: Granularity = Granularity.AUTO,
        flags: Flags = Flags.NONE,
    ):
        self.blocks, self.store, self.arena = blocks, store, arena
        self.tally = Tally()
        self.peers = Peers(blocks, store, transports)
        self.sender = tx.Sender(blocks)
        self.receiver = tx.Receiver(blocks, timeout_s)
        self._send, self._on_arrival = send, on_arrival
        self.on_moved: Callable[[int, float], None] = lambda blocks, seconds: None  # what came, for who weighs costs
        self._timeout_s, self._lease_s, self._renewed = timeout_s, lease_s, 0.0
        self._granularity, self._flags = granularity, flags  # of transfers that ask for nothing else
        self._pools = [ThreadPoolExecutor(2, f"{blocks.instance}-{what}") for what in ("ship", "land", "swap")]
        ship, land, swap = self._pools
        self._shipper = Shipper(store, arena, ship, post, self._ticket, self.abort, self.tally)
        self.swapper = Swapper(blocks.swaps, store, arena, swap, post)
        self._lander = Lander(store, arena, land, post, self.flush, self._landed, self.tally)
        self._transfers: dict[str, tuple[Transfer, Granularity]] = {}
        self.remote = Remote(blocks, self.peers, send, timeout_s, lease_s, self.tally)

    # -- the paper's verbs ---------------------------------------------------------------------------------------------

    def alloc_mem(
        self, size: int, medium: Medium = Medium.HBM, instance: str | None = None
    ) -> Future[list[BlockAddress]]:
        """Allocate ``size`` blocks here or at a peer, all or nothing (paper 4.1, Table 1).

        The caller owns one reference on each and gives it back with ``free_mem``; at a peer they are on a lease that
        this node renews by itself. The future raises PoolFull, RemoteRefused or TransferError; UnknownInstance comes at
        once.
        """
        if instance is not None and instance != self.blocks.instance:
            return self.remote.alloc(size, medium, instance, time.monotonic())
        future: Future[list[BlockAddress]] = Future()
        try:
            future.set_result(self.blocks.alloc_mem(size, medium))
        except PoolError as error:
            future.set_exception(error)
        return future

    def free_mem(self, addresses: Sequence[BlockAddress]) -> None:
        """Give back one reference on each address, wherever it lies (paper 4.1). Raises, changing nothing."""
        mine = [address for address in addresses if address.instance == self.blocks.instance]
        theirs = [address for address in addresses if address.instance != self.blocks.instance]
        self.remote.check_free(theirs)
        self.blocks.free_mem(mine)
        self.remote.free(theirs)

    def swap_out(self, num_blocks: int) -> Future[int]:
        """Move up to ``num_blocks`` cached blocks from HBM to DRAM, the least recently used; how many (paper 4.1)."""
        count = self.blocks.swap_out(num_blocks)
        return self._when_over(self.blocks.swaps.open_orders() if count else [], count)

    def swap_in(self, addresses: Sequence[BlockAddress]) -> Future[list[BlockAddress]]:
        """Bring DRAM blocks that the caller holds to HBM; new addresses, the caller's, for the old ones (paper 4.1).

        Raises PoolFull, StaleAddress or ForeignAddress at once, changing nothing. If the bytes turn out to be wrong the
        future raises CorruptBlock, both ends are given back and the prefix is forgotten.
        """
        fresh = self.blocks.swap_in(addresses)
        return self._when_over(self.blocks.swaps.open_orders()[-1:] if fresh else [], fresh)

    def _when_over[T](self, orders: list[Swap], value: T) -> Future[T]:
        """A future of ``value`` for when these orders are over."""
        result: Future[T] = Future()
        self.when_over(orders, lambda error: settle(result, value, error))
        self.flush()
        return result

    def when_over(self, orders: Sequence[Swap], call: Callable[[Exception | None], None]) -> None:
        """Call back when these orders are over, with the first error among them."""
        self.swapper.when_over(orders, call)

    def transfer(
        self,
        instance: str,
        source: Sequence[BlockAddress],
        destination: Sequence[BlockAddress] | None = None,
        flags: Flags = Flags.NONE,
        private: bytes | None = b"",
        granularity: Granularity = Granularity.AUTO,
        ready: int | None = None,
    ) -> Transfer:
        """Copy blocks to an instance (paper 4.3): into ``destination``, allocated there before, or allocated on demand.

        The caller keeps its references on ``source``; what was allocated on demand is the caller's, to be given back
        with ``free_mem``, unless ``flags`` has CLAIM. ``private`` (at most MAX_PRIVATE bytes) reaches the other
        owner's ``on_arrival`` unread; None: later, with ``close``. ``ready``: how many of the blocks have their bytes
        already, the others follow with ``more``. Raises UnknownInstance, InvalidTransfer, StaleAddress or
        ForeignAddress, changing nothing.
        """
        return self._begin(instance, None, source, destination, flags, private, granularity, ready)

    def transfer_with_insert(
        self,
        instance: str,
        tokens: Sequence[int],
        source: Sequence[BlockAddress],
        destination: Sequence[BlockAddress] | None = None,
        flags: Flags = Flags.NONE,
        private: bytes | None = b"",
        granularity: Granularity = Granularity.AUTO,
        ready: int | None = None,
        salt: str = "",
        adapter: str = "",
    ) -> Transfer:
        """The same, and the destination indexes the whole blocks of ``tokens`` before it answers (paper 4.3).

        Only the blocks that it lacks travel, unless ``flags`` has ALL_BLOCKS. They stay cached there, nobody's, unless
        ``flags`` has CLAIM.
        """
        return self._begin(instance, tokens, source, destination, flags, private, granularity, ready, salt, adapter)

    def _begin(
        self,
        instance: str,
        tokens: Sequence[int] | None,
        source: Sequence[BlockAddress],
        destination: Sequence[BlockAddress] | None,
        flags: Flags,
        private: bytes | None,
        granularity: Granularity,
        ready: int | None,
        salt: str = "",
        adapter: str = "",
    ) -> Transfer:
        """Both verbs; with tokens, they are for the destination's index."""
        self.peers.get(instance)
        check_transfer(self.blocks, instance, tokens, source, destination, private, ready)
        cut = self._cut(granularity)
        self.blocks.share(source)
        offer = self.sender.start(
            destination=instance,
            tokens=None if tokens is None else tuple(tokens),
            insert=tokens is not None,
            blocks=list(source),
            now=time.monotonic(),
            timeout_s=self._timeout_s,
            private=private,
            ready=ready,
            salt=salt,
            adapter=adapter,
            flags=flags | self._flags,
            parts=2 * self.store.layout.num_layers if cut is Granularity.BY_LAYER else 1,
            targets=tuple(destination or ()),
        )
        moving = Transfer(offer.transfer_id, instance)
        self._transfers[offer.transfer_id] = moving, cut
        self.tally.transfer_calls += offer.parts
        self._send(instance, offer)
        return moving

    def _cut(self, wish: Granularity) -> Granularity:
        chosen = self._granularity if wish is Granularity.AUTO else wish  # AUTO: see benchmarks/NOTES.md
        return Granularity.BY_REQUEST_AGG if chosen is Granularity.AUTO else chosen

    def more(self, transfer_id: str, ready: int) -> None:
        """The first ``ready`` blocks of a transfer have their bytes, or are ordered to get them before any read."""
        self._do(self.sender.more(transfer_id, ready, time.monotonic()))

    def close_transfer(self, transfer_id: str, private: bytes) -> None:
        """The private part of a transfer that was begun without it. Raises InvalidTransfer if it is too large."""
        check_private(private)
        self._do(self.sender.close(transfer_id, private, time.monotonic()))

    def abort(self, transfer_id: str, reason: str = "aborted") -> None:
        """Give a transfer up; its future raises TransferError. One that has ended is nothing to do."""
        self._do(self.sender.abort(transfer_id, reason))

    # -- the device ----------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Enqueue the reads of all swap orders. To be called before anything else writes to the pages."""
        self.swapper.flush()

    def write(self, addresses: Sequence[BlockAddress], blocks: np.ndarray) -> None:
        """Put bytes into blocks that the caller holds: [n, L, 2, K, C, H]. Waits for host memory, not for the device.

        Raises StaleAddress, ForeignAddress or InvalidAddresses, changing nothing.
        """
        self.blocks.require_held(addresses)
        self.flush()
        self.swapper.forget(address.index for address in addresses if address.medium is Medium.DRAM)
        write_blocks(self.store, self.arena, addresses, blocks)

    def read(self, addresses: Sequence[BlockAddress]) -> np.ndarray:
        """A copy of the bytes of blocks that the caller holds: [n, L, 2, K, C, H]. Waits for the device.

        Raises StaleAddress or ForeignAddress.
        """
        self.blocks.require_held(addresses)
        return read_blocks(self.store, self.arena, addresses)

    # -- peers ---------------------------------------------------------------------------------------------------------

    def greet(self, hello: tx.Hello) -> Peer:
        """Link up with the peer that said this, or raise TransferError with the reason why not.

        A peer that starts anew voids all that its former life had here.
        """
        known = self.peers.known(hello.instance)
        if known is not None and hello.epoch > known.epoch:
            self.forget_peer(hello.instance)
        return self.peers.greet(hello)

    def link_lost(self, peer: str) -> None:
        """Nothing comes from the peer any more: its transfers end now, its allocations with their lease."""
        self.receiver.drop_peer(peer)
        self.sender.drop_peer(peer)
        self.remote.link_lost(peer)
        self._settle()

    def forget_peer(self, peer: str) -> int:
        """The peer is dead or has left (membership says so): free all it had here; how many blocks were allocated."""
        self.link_lost(peer)
        self.peers.forget(peer)
        return self.remote.forget(peer)

    def handle(self, peer: str, message: tx.Message) -> None:
        """Take a message of a peer. One that is late, doubled, or makes no sense is counted and dropped."""
        now = time.monotonic()
        known = self.peers.known(peer)
        if known is None:
            self.tally.dropped += 1
            return
        match message:
            case tx.Offer() | tx.Data() | tx.Close() | tx.Cancel():
                if isinstance(message, tx.Offer | tx.Cancel) and message.source != peer:
                    self.tally.dropped += 1
                else:
                    self._do(self.receiver.on(message, now))
            case tx.Accept() | tx.Refuse() | tx.Done() | tx.Landed():
                moving, _ = self._transfers.get(message.transfer_id, (None, None))
                if moving is None or moving.destination != peer:
                    self.tally.dropped += 1
                    return
                self._do(self.sender.on(message, now))
                if isinstance(message, tx.Landed):
                    self._shipper.landed(message.transfer_id, message.start, message.part)
            case tx.Renew() if (message.source, message.epoch) == (peer, known.epoch):
                self.sender.renew(message.transfer_ids, peer, now)
                self.receiver.renew(message.transfer_ids, peer, now)
                self.remote.renewed(peer, message.addresses, now)
            case tx.Allocate() | tx.Free() if (message.source, message.epoch) == (peer, known.epoch):
                self.remote.on(peer, message, now)
            case tx.Allocated():
                self.remote.on(peer, message, now)
            case _:
                self.tally.dropped += 1

    def poll(self, now: float) -> None:
        """What time demands: deadlines, leases, renewals, copies to DRAM made ahead. ``now`` as time.monotonic()."""
        self.blocks.tick(now)
        self._do([*self.sender.expire(now), *self.receiver.expire(now)])
        self.remote.expire(now)
        if now - self._renewed >= min(self._lease_s, self._timeout_s) / 3:
            self._renewed = now
            self.remote.renew(self.sender.at_work(now), self.receiver.at_work(now))
        if self.arena is not None and self.blocks.reclaimable < WRITE_BACK_BELOW * self.blocks.capacity:
            self.blocks.write_back(WRITE_BACK_BLOCKS)
        self.flush()

    def close(self) -> None:
        """End the workers and the transports; futures that are open fail."""
        for transfer_id in list(self._transfers):
            self.sender.abort(transfer_id, "closed")
        self.remote.close()
        self._settle()
        for transport in self.peers.transports:
            transport.close()
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)

    def stats(self) -> NodeStats:
        """Counts for people and metrics."""
        counts = dataclasses.asdict(self.tally)
        counts["dropped"] += self.sender.dropped + self.receiver.dropped
        return NodeStats(
            transfers_out=len(self.sender),
            transfers_in=len(self.receiver),
            staged_bytes=self._shipper.staged_bytes,
            swaps=len(self.blocks.swaps),
            **counts,
        )

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _do(self, work: Sequence[tx.Send | tx.Ship | tx.Land | tx.Arrived]) -> None:
        """Carry out what the machines ask for, in order, and settle what ended."""
        unwanted: dict[str, str] = {}  # what the owner would not take, and why
        for item in work:
            match item:
                case tx.Send() if self.peers.known(item.to) is not None:
                    ended = item.message.transfer_id if isinstance(item.message, tx.Done) else ""
                    self._send(item.to, tx.Refuse(ended, unwanted[ended]) if ended in unwanted else item.message)
                case tx.Ship():
                    _, cut = self._transfers[item.transfer_id]
                    transport = self.peers.get(item.destination).transport
                    checked = not self.sender.flags(item.transfer_id) & Flags.NO_CHECKSUM
                    self._shipper.ship(item, transport, cut, checked)
                case tx.Land():
                    self._land(item)
                case tx.Arrived():
                    self.remote.lease(item.source, item.given, time.monotonic())
                    self.on_moved(item.moved, time.monotonic() - item.offered)
                    try:
                        if item.private or item.blocks:
                            self._on_arrival(item)
                    except TransferError as error:
                        unwanted[item.transfer_id] = self.receiver.disown(item.transfer_id, str(error))
        self._settle()

    def _land(self, land: tx.Land) -> None:
        try:
            self.swapper.forget(address.index for address in land.blocks if address.medium is Medium.DRAM)
            transport, endpoint = self.peers.way(land.source, land.ticket.get("way"))
            self._lander.land(land, transport, endpoint)
        except (TransferError, UnknownInstance) as error:
            self._landed(land, error)

    def _landed(self, land: tx.Land, error: Exception | None) -> None:
        if error is None:
            self._do(self.receiver.landed(land, time.monotonic()))
            return
        self.tally.corrupt += isinstance(error, CorruptBlock)
        self._do(self.receiver.failed(land, f"{type(error).__name__}: {error}"))

    def _ticket(self, transfer_id: str, start: int, stop: int, part: int, ticket: dict[str, object]) -> None:
        self._do(self.sender.data(transfer_id, start, stop, part, ticket, time.monotonic()))

    def _settle(self) -> None:
        """Resolve the futures of transfers that ended."""
        while self.sender.ended:
            transfer_id, error, targets, ours = self.sender.ended.pop(0)
            self._shipper.end(transfer_id)
            moving, _ = self._transfers.pop(transfer_id)
            if error is None:
                if ours:
                    self.remote.got(moving.destination, targets)
                moving.future.set_result(list(targets))
            else:
                self.tally.failed += 1
                moving.future.set_exception(TransferError(f"transfer to {moving.destination}: {error}"))
