"""The transfers that leave one pool.

    OFFERED ──Accept──▶ SHIPPING ──all ready, all data, Close──▶ SENT ──Done──▶ over
                                                                  └─deadline──▶ ASKED ──Done, Refuse, deadline──▶ over

A Refuse, an abort and (but for SENT) the deadline end every state.
"""

import dataclasses
import enum
import itertools
from typing import Any

from jmemserve.errors import TransferError
from jmemserve.kvpool.address import BlockAddress
from jmemserve.kvpool.blocks import BlockPool
from jmemserve.kvpool.transfer.messages import (
    Accept,
    Cancel,
    Close,
    Data,
    Done,
    Flags,
    Free,
    Landed,
    Message,
    Offer,
    Refuse,
    Send,
    Ship,
)


class _State(enum.Enum):
    OFFERED = "offered"
    SHIPPING = "shipping"
    SENT = "sent"
    ASKED = "asked"  # all data went out, the answer is overdue, and the destination was asked for it


@dataclasses.dataclass(slots=True)
class _Outgoing:
    """One transfer at its source. Invariant: it holds one reference on each of its blocks."""

    offer: Offer
    destination: str
    blocks: list[BlockAddress]
    timeout_s: float
    deadline: float
    ready: int  # blocks whose bytes are in place here
    private: bytes | None  # None: not known yet
    state: _State = _State.OFFERED
    targets: tuple[BlockAddress, ...] = ()
    shipped: int = 0  # blocks that need not travel or were given to a Ship
    unsent: int = 0  # shipped blocks times parts, less what data was made for
    aloft: set[tuple[int, int]] = dataclasses.field(default_factory=set)  # (start, part) of data, not yet landed


class Sender:
    """The transfers that leave one pool.

    ``ended`` collects (id, error or None, addresses at the destination, are they ours now?) until it is taken.
    """

    def __init__(self, pool: BlockPool):
        self._pool = pool
        self._transfers: dict[str, _Outgoing] = {}
        self._numbers = itertools.count()
        self.dropped = 0  # messages that were late, doubled or unknown
        self.ended: list[tuple[str, str | None, tuple[BlockAddress, ...], bool]] = []

    def __len__(self) -> int:
        return len(self._transfers)

    def has(self, transfer_id: str) -> bool:
        """Is the transfer still going on here?"""
        return transfer_id in self._transfers

    def flags(self, transfer_id: str) -> Flags:
        """What was asked of the destination of a transfer that goes on."""
        return self._transfers[transfer_id].offer.flags

    def by_peer(self) -> dict[str, list[str]]:
        """The ids of all transfers by destination."""
        ids: dict[str, list[str]] = {}
        for transfer_id, transfer in self._transfers.items():
            ids.setdefault(transfer.destination, []).append(transfer_id)
        return ids

    def at_work(self, now: float) -> dict[str, list[str]]:
        """The ids of all transfers that wait for this side alone, by destination; their deadlines run anew.

        Only these are to be renewed at the destination: if both sides did so while each waits for the other, a message
        that was lost would keep a transfer for ever.
        """
        ids: dict[str, list[str]] = {}
        for transfer_id, transfer in self._transfers.items():
            if transfer.state is _State.SHIPPING and not transfer.aloft:
                transfer.deadline = now + transfer.timeout_s
                ids.setdefault(transfer.destination, []).append(transfer_id)
        return ids

    def start(
        self,
        *,
        destination: str,
        tokens: tuple[int, ...] | None,
        insert: bool,
        blocks: list[BlockAddress],
        now: float,
        timeout_s: float,
        private: bytes | None = b"",
        ready: int | None = None,
        salt: str = "",
        adapter: str = "",
        flags: Flags = Flags.NONE,
        parts: int = 1,
        targets: tuple[BlockAddress, ...] = (),
    ) -> Offer:
        """Begin a transfer and return the offer to send. It takes over one reference on each block and gives it back.

        ``tokens`` are those whose keys and values fill the blocks, the last block perhaps in part. The first ``ready``
        blocks have their bytes in place (all by default), the others once ``more`` says so; with ``private`` None the
        transfer stays open until ``close``.
        """
        pool = self._pool
        transfer_id = f"{pool.instance}.{pool.epoch}.{next(self._numbers)}"
        offer = Offer(
            transfer_id, pool.instance, pool.epoch, tokens, insert, len(blocks), salt, adapter, flags, parts, targets
        )
        count = len(blocks) if ready is None else ready
        self._transfers[transfer_id] = _Outgoing(
            offer, destination, list(blocks), timeout_s, now + timeout_s, count, private
        )
        return offer

    def more(self, transfer_id: str, ready: int, now: float) -> list[Ship | Send]:
        """The first ``ready`` blocks have their bytes in place now. A transfer that has ended is nothing to do."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            return []
        total = len(transfer.blocks)
        assert transfer.ready <= ready <= total, f"{transfer.ready=}, {ready=}, {total=}"
        transfer.ready = ready
        return self._go_on(transfer, now)

    def close(self, transfer_id: str, private: bytes, now: float) -> list[Ship | Send]:
        """The private part of a transfer that was begun without it. One that has ended is nothing to do."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            return []
        assert transfer.private is None, f"transfer {transfer_id} has its private part already"
        transfer.private = private
        return self._go_on(transfer, now)

    def on(self, message: Message, now: float) -> list[Ship | Send]:
        """Take a message of the destination; an Accept may ask the caller to ship."""
        if not isinstance(message, Accept | Landed | Refuse | Done):
            self.dropped += 1
            return []
        transfer = self._transfers.get(message.transfer_id)
        state = transfer.state if transfer is not None else None
        match message:
            case Accept() if (
                transfer is not None
                and state is _State.OFFERED
                and message.epoch == transfer.offer.epoch
                and 0 <= message.have <= len(transfer.blocks) == len(message.addresses)
            ):
                transfer.state, transfer.shipped = _State.SHIPPING, message.have
                transfer.targets = message.addresses
                return self._go_on(transfer, now)
            case Landed() if transfer is not None and state is not _State.OFFERED:
                transfer.aloft.discard((message.start, message.part))
                transfer.deadline = now + transfer.timeout_s
            case Refuse() if transfer is not None:
                self._end(transfer, message.reason)
            case Done() if transfer is not None and state in (_State.SENT, _State.ASKED):
                self._end(transfer, None)
            case _:
                self.dropped += 1
        return []

    def data(
        self, transfer_id: str, start: int, stop: int, part: int, ticket: dict[str, Any], now: float
    ) -> list[Ship | Send]:
        """A ticket was made for one part of the blocks start .. stop of the offer: send it, and Close after the last.

        Raises TransferError if the transfer has ended already.
        """
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is not _State.SHIPPING:
            raise TransferError(f"transfer {transfer_id} is not being shipped")
        transfer.unsent -= stop - start
        assert transfer.unsent >= 0, f"{transfer_id}: {start=}, {stop=} is more than was shipped ({transfer.unsent=})"
        transfer.aloft.add((start, part))
        data = Data(transfer_id, transfer.offer.epoch, start, stop, part, ticket)
        return [Send(transfer.destination, data), *self._go_on(transfer, now)]

    def renew(self, transfer_ids: tuple[str, ...], peer: str, now: float) -> None:
        """The destination is at work on these."""
        for transfer_id in transfer_ids:
            transfer = self._transfers.get(transfer_id)
            if transfer is not None and transfer.destination == peer:
                transfer.deadline = now + transfer.timeout_s

    def expire(self, now: float) -> list[Send]:
        """End what is past its deadline; what may be done over there is asked about first, for as long again."""
        sends = []
        for transfer in [transfer for transfer in self._transfers.values() if now >= transfer.deadline]:
            reason = f"no answer to {self._pool.instance} for {transfer.timeout_s:g} s"
            if transfer.state is not _State.ASKED:
                sends.append(self._cancel(transfer, reason))
            if transfer.state is _State.SENT:
                transfer.state, transfer.deadline = _State.ASKED, now + transfer.timeout_s
            else:
                sends += self._give_up(transfer, reason)
        return sends

    def abort(self, transfer_id: str, reason: str = "aborted") -> list[Send]:
        """Give a transfer up, whatever its state. An unknown one is nothing to do."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            return []
        reason = f"{reason} at {self._pool.instance}"
        return [self._cancel(transfer, reason), *self._give_up(transfer, reason)]

    def drop_peer(self, destination: str) -> list[str]:
        """The instance is gone: end every transfer to it and return their ids."""
        gone = [transfer for transfer in self._transfers.values() if transfer.destination == destination]
        for transfer in gone:
            self._end(transfer, f"{destination} is gone")
        return [transfer.offer.transfer_id for transfer in gone]

    def _go_on(self, transfer: _Outgoing, now: float) -> list[Ship | Send]:
        """Whatever can be done next: ship what is ready, close when all is sent."""
        transfer.deadline = now + transfer.timeout_s
        if transfer.state is not _State.SHIPPING:
            return []
        offer, start = transfer.offer, transfer.shipped
        work: list[Ship | Send] = []
        if transfer.ready > start:
            sources, targets = transfer.blocks[start : transfer.ready], transfer.targets[start : transfer.ready]
            transfer.shipped = transfer.ready
            transfer.unsent += len(sources) * offer.parts
            work.append(Ship(offer.transfer_id, transfer.destination, start, tuple(sources), targets))
        if transfer.unsent == 0 and transfer.shipped == len(transfer.blocks) and transfer.private is not None:
            transfer.state = _State.SENT
            work.append(Send(transfer.destination, Close(offer.transfer_id, offer.epoch, transfer.private)))
        return work

    def _give_up(self, transfer: _Outgoing, reason: str) -> list[Send]:
        """End a transfer without waiting for what the destination says to Cancel."""
        self._end(transfer, reason)
        if transfer.state not in (_State.SENT, _State.ASKED) or not _keeps(transfer.offer):
            return []
        # It may be done over there, and the blocks ours by name; if it was not, Cancel ended it and Free finds nothing.
        pool = self._pool
        return [Send(transfer.destination, Free(pool.instance, pool.epoch, transfer.targets))]

    def _cancel(self, transfer: _Outgoing, reason: str) -> Send:
        return Send(transfer.destination, Cancel(transfer.offer.transfer_id, self._pool.instance, reason))

    def _end(self, transfer: _Outgoing, error: str | None) -> None:
        del self._transfers[transfer.offer.transfer_id]
        self.ended.append((transfer.offer.transfer_id, error, transfer.targets, _keeps(transfer.offer)))
        self._pool.free_mem(transfer.blocks)


def _keeps(offer: Offer) -> bool:
    """Are the blocks at the destination the source's once the transfer is done, without having been before?"""
    return not offer.insert and not offer.destination and not offer.flags & Flags.CLAIM
