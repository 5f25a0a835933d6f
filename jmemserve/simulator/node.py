"""Stands in for a ``PoolNode``: the real protocol of transfers; moving the bytes takes what the cost model says.

Each instance sends over one link and receives over one, and either carries one transfer at a time. As in the real one,
a message waits until its receiver's loop comes round, and a read of blocks waits for the steps enqueued before it.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from jmemserve.engine.messages import FromPeer
from jmemserve.errors import TransferError
from jmemserve.kvpool import BlockAddress, BlockPool
from jmemserve.kvpool import transfer as tx
from jmemserve.scheduler.cost_model import CostModel
from jmemserve.simulator.clock import Clock, Device

TIMEOUT_S = 1e9  # nothing is lost here


class Moving:
    """A transfer on its way."""

    def __init__(self, transfer_id: str):
        self.transfer_id = transfer_id
        self.future: Future[list[BlockAddress]] = Future()


class Network:
    """Who is there, and when the links are free."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.inboxes: dict[str, Callable[[object], None]] = {}
        self._sending: dict[str, float] = {}
        self._receiving: dict[str, float] = {}
        self.blocks: dict[tuple[str, str], int] = {}  # that went from where to where
        self.transfers = 0

    def known(self, instance: str) -> object | None:
        """As of ``Peers``: everybody can be reached."""
        return self.inboxes.get(instance)

    def carry(self, source: str, destination: str, blocks: int, seconds: float, over: Callable[[], None]) -> None:
        """Call when so many blocks have gone over a link."""
        start = max(self.clock.now, self._sending.get(source, 0.0), self._receiving.get(destination, 0.0))
        self._sending[source] = self._receiving[destination] = start + seconds
        way = source, destination
        self.blocks[way] = self.blocks.get(way, 0) + blocks
        self.transfers += 1
        self.clock.at(start + seconds, over)


class SimNode:
    """One instance's end. ``post`` puts something into its own inbox; what is callable there is called."""

    def __init__(
        self,
        pool: BlockPool,
        network: Network,
        device: Device,
        costs: CostModel,
        post: Callable[[object], None],
        on_arrival: Callable[[tx.Arrived], None],
    ):
        self.blocks, self.peers = pool, network
        self._device, self._costs, self._post, self._on_arrival = device, costs, post, on_arrival
        self._clock = network.clock
        self._sender, self._receiver = tx.Sender(pool), tx.Receiver(pool, TIMEOUT_S)
        self._moving: dict[str, Moving] = {}

    def __len__(self) -> int:
        return len(self._sender) + len(self._receiver)

    def transfer_with_insert(
        self,
        instance: str,
        tokens: Sequence[int],
        source: Sequence[BlockAddress],
        *,
        flags: tx.Flags = tx.Flags.NONE,
        private: bytes | None = b"",
        salt: str = "",
    ) -> Moving:
        self.blocks.share(source)
        offer = self._sender.start(
            destination=instance,
            tokens=tuple(tokens),
            insert=True,
            blocks=list(source),
            now=self._clock.now,
            timeout_s=TIMEOUT_S,
            private=private,
            salt=salt,
            flags=flags,
        )
        moving = self._moving[offer.transfer_id] = Moving(offer.transfer_id)
        self.send(instance, offer)
        return moving

    def free_mem(self, addresses: Sequence[BlockAddress]) -> None:
        self.blocks.free_mem(addresses)

    def abort(self, transfer_id: str) -> None:
        self._do(self._sender.abort(transfer_id))

    def send(self, to: str, message: tx.Message) -> None:
        """Put a message into a peer's inbox."""
        self.peers.inboxes[to](FromPeer(self.blocks.instance, message))

    def handle(self, message: tx.Message) -> None:
        """Take a message of a peer."""
        to_receiver = isinstance(message, tx.Offer | tx.Data | tx.Close | tx.Cancel)
        self._do((self._receiver if to_receiver else self._sender).on(message, self._clock.now))

    def _do(self, work: Sequence[tx.Send | tx.Ship | tx.Land | tx.Arrived]) -> None:
        """Carry out what the machines ask for, in order, and settle what ended."""
        unwanted: dict[str, str] = {}
        for item in work:
            match item:
                case tx.Send():
                    ended = item.message.transfer_id if isinstance(item.message, tx.Done) else ""
                    self.send(item.to, tx.Refuse(ended, unwanted[ended]) if ended in unwanted else item.message)
                case tx.Ship():  # read when the steps before are done; then the ticket goes out from this thread
                    self._device.enqueue(0.0, functools.partial(self._post, functools.partial(self._shipped, item)))
                case tx.Land():
                    seconds, here = self._costs.transfer_s(len(item.blocks)), self.blocks.instance
                    over = functools.partial(self._post, functools.partial(self._landed, item))
                    self.peers.carry(item.source, here, len(item.blocks), seconds, over)
                case tx.Arrived():
                    try:
                        if item.private or item.blocks:
                            self._on_arrival(item)
                    except TransferError as error:
                        unwanted[item.transfer_id] = self._receiver.disown(item.transfer_id, str(error))
        self._settle()

    def _shipped(self, ship: tx.Ship) -> None:
        if self._sender.has(ship.transfer_id):
            stop = ship.start + len(ship.sources)
            now = self._clock.now
            self._do(self._sender.data(ship.transfer_id, ship.start, stop, tx.WHOLE, {}, now))

    def _landed(self, land: tx.Land) -> None:
        self._do(self._receiver.landed(land, self._clock.now))

    def _settle(self) -> None:
        while self._sender.ended:
            transfer_id, error, targets, _ = self._sender.ended.pop(0)
            future = self._moving.pop(transfer_id).future
            if error is None:
                future.set_result(list(targets))
            else:
                future.set_exception(TransferError(error))
