"""The transfers that come to one pool.

    ACCEPTED ──Data, landed──▶ ... ──Close, and all has landed──▶ over, and done

Until then nobody can find the blocks that came; a Cancel, an abort, the deadline or a write that failed ends it, and
the blocks are freed after the last write under way.
"""

import dataclasses

from jmemserve.errors import PoolError
from jmemserve.kvpool.address import BlockAddress
from jmemserve.kvpool.blocks import BlockPool
from jmemserve.kvpool.transfer.messages import (
    WHOLE,
    Accept,
    Arrived,
    Cancel,
    Close,
    Data,
    Done,
    Flags,
    Land,
    Landed,
    Message,
    Offer,
    Refuse,
    Send,
)

MAX_REMEMBERED = 4096  # transfers whose end is remembered
MAX_PARTS = 4096  # of an offer: no model has half as many layers
MAX_TOKEN = 2**31 - 1  # the index keeps token ids as int32


@dataclasses.dataclass(slots=True)
class _Incoming:
    """One transfer at its destination. Invariant: it holds one reference on each of its blocks."""

    offer: Offer
    cached: list[BlockAddress]  # found here
    fresh: list[BlockAddress]  # allocated for it, or named by the source
    deadline: float
    came: list[bytearray]  # by part, by place behind the cached ones: has data come for it?
    lacking: int  # places times parts whose bytes have not come
    writing: int = 0  # Land actions without their ``landed`` or ``failed``
    over: bool = False  # ended, but for writes under way
    private: bytes | None = None  # of the Close
    offered: float = 0.0  # when the offer came


class Receiver:
    """The transfers that come to one pool; at most ``max_in_flight`` at a time, others are refused."""

    def __init__(self, pool: BlockPool, timeout_s: float = 60.0, max_in_flight: int = 256):
        self._pool = pool
        self._timeout_s = timeout_s
        self._max_in_flight = max_in_flight
        self._transfers: dict[str, _Incoming] = {}
        self._epochs: dict[str, int] = {}  # the newest of each source
        self._ended: dict[str, bool] = {}  # transfer id -> was it done; oldest first
        self.dropped = 0  # messages that were late, doubled, wrong or unknown

    def __len__(self) -> int:
        return len(self._transfers)

    def by_peer(self) -> dict[str, list[str]]:
        """The ids of all transfers by source."""
        ids: dict[str, list[str]] = {}
        for transfer_id, transfer in self._transfers.items():
            ids.setdefault(transfer.offer.source, []).append(transfer_id)
        return ids

    def at_work(self, now: float) -> dict[str, list[str]]:
        """The ids of all transfers whose bytes are being written, by source; their deadlines run anew."""
        ids: dict[str, list[str]] = {}
        for transfer_id, transfer in self._transfers.items():
            if transfer.writing and not transfer.over:
                transfer.deadline = now + self._timeout_s
                ids.setdefault(transfer.offer.source, []).append(transfer_id)
        return ids

    def on(self, message: Message, now: float) -> list[Send | Land | Arrived]:
        """Take a message of a source; returns answers to send and writes to do."""
        match message:
            case Offer():
                return [*self._on_offer(message, now)]
            case Data():
                return [*self._on_data(message, now)]
            case Close():
                return [*self._on_close(message, now)]
            case Cancel():
                return [self._on_cancel(message)]
            case _:
                self.dropped += 1
                return []

    def landed(self, land: Land, now: float) -> list[Send | Arrived]:
        """The bytes of one Land are in place, or ordered before all that could read them.

        After the last the whole blocks are put into the index; then Arrived comes before Done, which is to be sent
        once the blocks that are claimed are in good hands.
        """
        transfer = self._written(land.transfer_id)
        if transfer is None:
            return []
        transfer.deadline = now + self._timeout_s
        return [Send(land.source, Landed(land.transfer_id, land.start, land.part)), *self._complete(transfer)]

    def failed(self, land: Land, reason: str) -> list[Send]:
        """The bytes of one Land did not come, or not as they had left: the transfer ends, alone."""
        transfer = self._written(land.transfer_id)
        return self._end(transfer, reason) if transfer is not None else []

    def renew(self, transfer_ids: tuple[str, ...], peer: str, now: float) -> None:
        """The source is at work on these."""
        for transfer_id in transfer_ids:
            transfer = self._transfers.get(transfer_id)
            if transfer is not None and transfer.offer.source == peer:
                transfer.deadline = now + self._timeout_s

    def expire(self, now: float) -> list[Send]:
        """End what is past its deadline."""
        late = [t for t in self._transfers.values() if now >= t.deadline and not t.over]
        reason = f"nothing came to {self._pool.instance} for {self._timeout_s:g} s"
        return [send for transfer in late for send in self._end(transfer, reason)]

    def abort(self, transfer_id: str) -> list[Send]:
        """Give a transfer up. An unknown one is nothing to do."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.over:
            return []
        return self._end(transfer, f"aborted at {self._pool.instance}")

    def disown(self, transfer_id: str, reason: str) -> str:
        """The owner did not take what has arrived: whoever asks is told that it was refused. Returns the reason."""
        self._remember(transfer_id, False)
        return reason

    def drop_peer(self, source: str) -> list[str]:
        """The instance is gone: end every transfer from it and return their ids."""
        gone = [t for t in self._transfers.values() if t.offer.source == source and not t.over]
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
        whole, total = len(tokens) // pool.block_size, offer.num_blocks
        named = len(set(offer.destination))
        if total < whole or named not in (0, total) or not 1 <= offer.parts <= MAX_PARTS:
            reason = f"{total} blocks in {offer.parts} parts and {named} different addresses"
            return self._refuse(offer, f"{reason} do not fit {len(tokens)} tokens")
        if tokens and not -MAX_TOKEN - 1 <= min(tokens) <= max(tokens) <= MAX_TOKEN:
            return self._refuse(offer, f"token ids are not within {-MAX_TOKEN - 1}..{MAX_TOKEN}")
        if len(self._transfers) >= self._max_in_flight:
            return self._refuse(offer, f"{self._max_in_flight} transfers are under way to {pool.instance}")
        delta = offer.insert and not offer.destination and not offer.flags & Flags.ALL_BLOCKS
        with pool.hold(tokens, offer.salt, whole if delta else 0, offer.adapter) as match:
            try:
                if offer.destination:
                    pool.check_exclusive(offer.destination, offer.source)
                    pool.share(offer.destination)
                    fresh = list(offer.destination)
                else:
                    lacking = total - len(match.addresses)
                    fresh = pool.alloc_mem(lacking, offer.flags.medium)
            except PoolError as error:
                return self._refuse(offer, str(error))
            cached = match.take()
        came = [bytearray(len(fresh)) for _ in range(offer.parts)]
        transfer = _Incoming(offer, cached, fresh, now + self._timeout_s, came, len(fresh) * offer.parts, offered=now)
        self._transfers[transfer_id] = transfer
        return [Send(offer.source, Accept(transfer_id, offer.epoch, len(cached), (*cached, *fresh)))]

    def _on_data(self, data: Data, now: float) -> list[Land]:
        transfer = self._transfers.get(data.transfer_id)
        if transfer is None or transfer.over or data.epoch != transfer.offer.epoch:
            self.dropped += 1
            return []
        offer, first = transfer.offer, len(transfer.cached)
        row = data.part if offer.parts > 1 else data.part - WHOLE
        if not (first <= data.start < data.stop <= offer.num_blocks and 0 <= row < offer.parts):
            self.dropped += 1
            return []
        start, stop = data.start - first, data.stop - first
        if any(transfer.came[row][start:stop]):
            self.dropped += 1
            return []
        transfer.came[row][start:stop] = b"\1" * (stop - start)
        transfer.lacking -= stop - start
        transfer.writing += 1
        transfer.deadline = now + self._timeout_s
        checked = not offer.flags & Flags.NO_CHECKSUM
        blocks = tuple(transfer.fresh[start:stop])
        return [Land(data.transfer_id, offer.source, data.start, blocks, data.part, data.ticket, checked)]

    def _on_close(self, close: Close, now: float) -> list[Send | Arrived]:
        transfer = self._transfers.get(close.transfer_id)
        if (
            transfer is None
            or transfer.over
            or transfer.private is not None
            or close.epoch != transfer.offer.epoch
            or transfer.lacking  # links keep the order of messages: with Close all data has come
        ):
            self.dropped += 1
            return []
        transfer.private = close.private
        transfer.deadline = now + self._timeout_s
        return self._complete(transfer)

    def _on_cancel(self, cancel: Cancel) -> Send:
        """Whatever the source meant, to give up or to ask, it learns how the transfer has ended."""
        transfer_id = cancel.transfer_id
        transfer = self._transfers.get(transfer_id)
        if transfer is not None and not transfer.over:
            return self._end(transfer, cancel.reason)[0]
        if self._ended.get(transfer_id):
            return Send(cancel.source, Done(transfer_id))
        self._remember(transfer_id, False)  # should its offer come after this, it is void
        return Send(cancel.source, Refuse(transfer_id, cancel.reason))

    # -- endings -----------------------------------------------------------------------------------------------------

    def _written(self, transfer_id: str) -> _Incoming | None:
        """One Land is over; the transfer, unless it has ended meanwhile."""
        transfer = self._transfers.get(transfer_id)
        assert transfer is not None and transfer.writing > 0, f"nothing is being written for transfer {transfer_id}"
        transfer.writing -= 1
        if transfer.over:
            self._free_if_quiet(transfer)
            return None
        return transfer

    def _complete(self, transfer: _Incoming) -> list[Send | Arrived]:
        if transfer.writing or transfer.lacking or transfer.private is None:
            return []
        offer, pool = transfer.offer, self._pool
        blocks = (*transfer.cached, *transfer.fresh)
        if offer.insert and offer.tokens is not None:
            try:
                pool.insert(offer.tokens, blocks, offer.salt, offer.adapter)
            except PoolError as error:  # the source named blocks that hold other tokens here
                return [*self._end(transfer, str(error))]
        del self._transfers[offer.transfer_id]
        claimed = bool(offer.flags & Flags.CLAIM)
        given: tuple[BlockAddress, ...] = ()
        if not claimed and not offer.insert and not offer.destination:
            given = tuple(transfer.fresh)  # what was only transferred stays allocated for the source
            pool.give(given, offer.source)
        elif not claimed:
            pool.free_mem(blocks)
        self._remember(offer.transfer_id, True)
        kept = blocks if claimed else ()
        moved = len(transfer.fresh)
        arrived = Arrived(
            offer.transfer_id, offer.source, transfer.private, kept, offer.tokens, given, transfer.offered, moved
        )
        return [arrived, Send(offer.source, Done(offer.transfer_id))]

    def _refuse(self, offer: Offer, reason: str) -> list[Send]:
        self._remember(offer.transfer_id, False)
        return [Send(offer.source, Refuse(offer.transfer_id, reason))]

    def _end(self, transfer: _Incoming, reason: str) -> list[Send]:
        """End a transfer and tell its source."""
        transfer.over = True
        self._free_if_quiet(transfer)
        return self._refuse(transfer.offer, reason)

    def _free_if_quiet(self, transfer: _Incoming) -> None:
        if transfer.writing:
            return
        del self._transfers[transfer.offer.transfer_id]
        self._pool.free_mem([*transfer.cached, *transfer.fresh])

    def _remember(self, transfer_id: str, done: bool) -> None:
        self._ended[transfer_id] = done
        if len(self._ended) > MAX_REMEMBERED:
            del self._ended[next(iter(self._ended))]
