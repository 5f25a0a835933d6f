"""The transfers that come to one pool.

    ACCEPTED ──Data, landed──▶ READY ──claim──▶ over

Until READY nobody can find the blocks that came; a Cancel, an abort, or the deadline ends ACCEPTED, and only the
deadline or an abort ends READY, where the source was told that it is done.
"""

import dataclasses
import enum
from typing import Any

from jmemserve.errors import PoolFull, TransferError
from jmemserve.kvpool.address import BlockAddress
from jmemserve.kvpool.pool import MemPool
from jmemserve.kvpool.transfer.messages import Accept, Cancel, Data, Done, Land, Message, Offer, Refuse, Send

MAX_REMEMBERED = 4096  # transfers whose end is remembered


class _State(enum.Enum):
    ACCEPTED = "accepted"
    READY = "ready"


@dataclasses.dataclass(slots=True)
class _Incoming:
    """One transfer at its destination. Invariant: it holds one reference on each of its blocks."""

    offer: Offer
    cached: list[BlockAddress]  # found here
    fresh: list[BlockAddress]  # allocated, in the source's name
    deadline: float
    lacking: set[int]  # positions in the offer whose bytes have not come
    state: _State = _State.ACCEPTED
    writing: int = 0  # Land actions without their ``landed``
    over: bool = False  # ended, but for writes under way: the blocks are freed after the last of them
    closed: bool = False  # the last Data has come; with nothing to ship it is the empty one


class Receiver:
    """The transfers that come to one pool; at most ``max_in_flight`` at a time, others are refused."""

    def __init__(self, pool: MemPool, timeout_s: float = 60.0, max_in_flight: int = 256):
        self._pool = pool
        self._timeout_s = timeout_s
        self._max_in_flight = max_in_flight
        self._transfers: dict[str, _Incoming] = {}
        self._epochs: dict[str, int] = {}  # the newest of each source
        self._ended: dict[str, bool] = {}  # transfer id -> was it done; oldest first
        self.dropped = 0  # messages that were late, doubled, wrong or unknown
        self.unclaimed = 0  # transfers that were done and that nobody claimed in time

    def __len__(self) -> int:
        return len(self._transfers)

    def on(self, message: Message, now: float) -> list[Send | Land]:
        """Take a message of a source; returns answers to send and writes to do."""
        match message:
            case Offer():
                return [*self._on_offer(message, now)]
            case Data():
                return [*self._on_data(message, now)]
            case Cancel():
                return [self._on_cancel(message)]
            case _:
                self.dropped += 1
                return []

    def landed(self, transfer_id: str, now: float) -> list[Send]:
        """The bytes of one Land are in place, or ordered before all that could read them.

        After the last, the whole blocks are put into the index; the answer is Done, to be sent once the claimed
        blocks are in good hands.
        """
        transfer = self._transfers.get(transfer_id)
        assert transfer is not None and transfer.writing > 0, f"nothing is being written for transfer {transfer_id}"
        transfer.writing -= 1
        if transfer.over:
            self._free_if_quiet(transfer)
            return []
        transfer.deadline = now + self._timeout_s
        if transfer.writing or transfer.lacking or not transfer.closed:
            return []
        offer = transfer.offer
        if offer.tokens is not None:
            self._pool.insert(offer.tokens, [*transfer.cached, *transfer.fresh], offer.salt)
        transfer.state = _State.READY
        self._remember(transfer_id, True)
        return [Send(offer.source, Done(transfer_id))]

    def claim(self, transfer_id: str) -> tuple[Any, list[BlockAddress]]:
        """Take over a transfer that is ready: (the offer's private, all blocks in order, held for the caller).

        Raises TransferError if it is not ready, or was not claimed in time.
        """
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is not _State.READY:
            raise TransferError(f"transfer {transfer_id} is not ready to be claimed")
        del self._transfers[transfer_id]
        self._pool.disown(transfer.fresh, transfer.offer.source)
        return transfer.offer.private, [*transfer.cached, *transfer.fresh]

    def expire(self, now: float) -> list[Send]:
        """End what is past its deadline."""
        sends = []
        for transfer in [transfer for transfer in self._transfers.values() if now >= transfer.deadline]:
            self.unclaimed += transfer.state is _State.READY
            sends += self._end(transfer, f"nothing came to {self._pool.instance} for {self._timeout_s:g} s")
        return sends

    def abort(self, transfer_id: str) -> list[Send]:
        """Give a transfer up, whatever its state. An unknown one is nothing to do."""
        transfer = self._transfers.get(transfer_id)
        return self._end(transfer, f"aborted at {self._pool.instance}") if transfer is not None else []

    def drop_peer(self, source: str) -> list[str]:
        """The instance is gone: end every transfer from it that is not ready, and return their ids."""
        gone = [
            transfer
            for transfer in self._transfers.values()
            if transfer.offer.source == source and transfer.state is not _State.READY
        ]
        for transfer in gone:
            self._end(transfer, "the source is gone")
        return [transfer.offer.transfer_id for transfer in gone]

    # -- messages ----------------------------------------------------------------------------------------------------

    def _on_offer(self, offer: Offer, now: float) -> list[Send]:
        transfer_id, pool = offer.transfer_id, self._pool
        newest = self._epochs.get(offer.source, offer.epoch)
        if transfer_id in self._transfers or transfer_id in self._ended or offer.epoch < newest:
            self.dropped += 1
            return []
        if offer.epoch > newest:
            self.drop_peer(offer.source)
        self._epochs[offer.source] = offer.epoch
        tokens = () if offer.tokens is None else offer.tokens
        if len(tokens) // pool.block_size > offer.num_blocks:
            return self._refuse(offer, f"{offer.num_blocks} blocks cannot hold {len(tokens)} tokens")
        if len(self._transfers) >= self._max_in_flight:
            return self._refuse(offer, f"{self._max_in_flight} transfers are under way to {pool.instance}")
        with pool.hold(tokens, offer.salt, len(tokens) // pool.block_size) as match:
            try:
                fresh = pool.alloc_mem(offer.num_blocks - len(match.addresses), owner=offer.source)
            except PoolFull as full:
                return self._refuse(offer, str(full))
            cached = match.take()
        lacking = set(range(len(cached), offer.num_blocks))
        self._transfers[transfer_id] = _Incoming(offer, cached, fresh, now + self._timeout_s, lacking)
        return [Send(offer.source, Accept(transfer_id, offer.epoch, len(cached), (*cached, *fresh)))]

    def _on_data(self, data: Data, now: float) -> list[Land]:
        transfer = self._transfers.get(data.transfer_id)
        if (
            transfer is None
            or transfer.over
            or transfer.closed
            or data.epoch != transfer.offer.epoch
            or not len(transfer.cached) <= data.start <= data.stop <= transfer.offer.num_blocks
            or not transfer.lacking.issuperset(range(data.start, data.stop))
            or (data.start == data.stop and transfer.lacking)
        ):
            self.dropped += 1
            return []
        transfer.lacking.difference_update(range(data.start, data.stop))
        transfer.closed = not transfer.lacking
        transfer.writing += 1
        transfer.deadline = now + self._timeout_s
        first = len(transfer.cached)
        blocks = tuple(transfer.fresh[data.start - first : data.stop - first])
        return [Land(data.transfer_id, blocks, data.payload, transfer.closed)]

    def _on_cancel(self, cancel: Cancel) -> Send:
        """Whatever the source meant, to give up or to ask, it learns how the transfer has ended."""
        transfer_id = cancel.transfer_id
        transfer = self._transfers.get(transfer_id)
        if transfer is not None and transfer.state is not _State.READY and not transfer.over:
            return self._end(transfer, cancel.reason)[0]
        if self._ended.get(transfer_id):
            return Send(cancel.source, Done(transfer_id))
        self._remember(transfer_id, False)  # should its offer come after this, it is void
        return Send(cancel.source, Refuse(transfer_id, cancel.reason))

    # -- endings -----------------------------------------------------------------------------------------------------

    def _refuse(self, offer: Offer, reason: str) -> list[Send]:
        self._remember(offer.transfer_id, False)
        return [Send(offer.source, Refuse(offer.transfer_id, reason))]

    def _end(self, transfer: _Incoming, reason: str) -> list[Send]:
        """End a transfer and tell its source, unless that has had its answer."""
        told = transfer.over or transfer.state is _State.READY
        transfer.over = True
        self._free_if_quiet(transfer)
        return [] if told else self._refuse(transfer.offer, reason)

    def _free_if_quiet(self, transfer: _Incoming) -> None:
        if transfer.writing:
            return
        del self._transfers[transfer.offer.transfer_id]
        self._pool.free_mem(transfer.fresh, owner=transfer.offer.source)
        self._pool.free_mem(transfer.cached)

    def _remember(self, transfer_id: str, done: bool) -> None:
        self._ended[transfer_id] = done
        if len(self._ended) > MAX_REMEMBERED:
            del self._ended[next(iter(self._ended))]
