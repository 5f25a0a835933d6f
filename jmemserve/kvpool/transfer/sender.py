"""The transfers that leave one pool.

    OFFERED ──Accept──▶ SHIPPING ──data──▶ SENT ──Done──▶ over
                                            └─deadline──▶ ASKED ──Done, Refuse or deadline──▶ over

A Refuse, an abort and (but for SENT) the deadline end every state.
"""

import dataclasses
import enum
import itertools
from typing import Any

from jmemserve.errors import TransferError
from jmemserve.kvpool.address import BlockAddress
from jmemserve.kvpool.pool import MemPool
from jmemserve.kvpool.transfer.messages import Accept, Cancel, Data, Done, Message, Offer, Refuse, Send, Ship


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
    state: _State = _State.OFFERED
    have: int = 0
    shipped: int = 0  # blocks that need not travel or were handed to ``data``


class Sender:
    """The transfers that leave one pool."""

    def __init__(self, pool: MemPool):
        self._pool = pool
        self._transfers: dict[str, _Outgoing] = {}
        self._numbers = itertools.count()
        self.dropped = 0  # messages that were late, doubled or unknown

    def __len__(self) -> int:
        return len(self._transfers)

    def has(self, transfer_id: str) -> bool:
        """Is the transfer still going on here?"""
        return transfer_id in self._transfers

    def start(
        self,
        *,
        destination: str,
        tokens: tuple[int, ...] | None,
        blocks: list[BlockAddress],
        salt: str,
        layout: str,
        private: Any,
        now: float,
        timeout_s: float,
    ) -> Offer:
        """Begin a transfer and return the offer to send. It takes over one reference on each block and gives it back.

        ``tokens`` are those whose keys and values fill the blocks, the last block perhaps in part.
        """
        pool = self._pool
        assert tokens is None or len(blocks) == -(-len(tokens) // pool.block_size), f"{len(blocks)=}, {len(tokens)=}"
        transfer_id = f"{pool.instance}.{pool.epoch}.{next(self._numbers)}"
        offer = Offer(transfer_id, pool.instance, pool.epoch, tokens, len(blocks), salt, layout, private)
        self._transfers[transfer_id] = _Outgoing(offer, destination, list(blocks), timeout_s, now + timeout_s)
        return offer

    def on(self, message: Message, now: float) -> list[Ship]:
        """Take a message of the destination; an Accept asks the caller to ship."""
        transfer = self._transfers.get(message.transfer_id)
        state = transfer.state if transfer is not None else None
        match message:
            case Accept(epoch=epoch, have=have) if (
                transfer is not None
                and state is _State.OFFERED
                and epoch == transfer.offer.epoch
                and 0 <= have <= len(transfer.blocks)
            ):
                transfer.state, transfer.have, transfer.shipped = _State.SHIPPING, have, have
                transfer.deadline = now + transfer.timeout_s
                return [Ship(message.transfer_id, transfer.destination, tuple(transfer.blocks[have:]))]
            case Refuse() if transfer is not None:
                self._end(transfer)
            case Done() if transfer is not None and state in (_State.SENT, _State.ASKED):
                self._end(transfer)
            case _:
                self.dropped += 1
        return []

    def data(self, transfer_id: str, start: int, stop: int, payload: Any, now: float) -> Data:
        """Make the message with the bytes of ``Ship.blocks[start:stop]``; pieces are made in order, without gaps.

        The payload must be a copy: the blocks may be written by others once the transfer ends. Raises TransferError
        if it has ended already.
        """
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is not _State.SHIPPING:
            raise TransferError(f"transfer {transfer_id} is not being shipped")
        start, stop = start + transfer.have, stop + transfer.have
        total = len(transfer.blocks)
        assert start == transfer.shipped and start <= stop <= total, f"{start=}, {stop=}, {transfer.shipped=}, {total=}"
        transfer.shipped = stop
        transfer.deadline = now + transfer.timeout_s
        if stop == total:
            transfer.state = _State.SENT
        return Data(transfer_id, transfer.offer.epoch, start, stop, payload)

    def expire(self, now: float) -> list[Send]:
        """End what is past its deadline; what may be done over there is asked about first, for as long again."""
        sends = []
        for transfer in [transfer for transfer in self._transfers.values() if now >= transfer.deadline]:
            if transfer.state is not _State.ASKED:
                reason = f"no answer at {self._pool.instance} for {transfer.timeout_s:g} s"
                sends.append(self._cancel(transfer, reason))
            if transfer.state is _State.SENT:
                transfer.state, transfer.deadline = _State.ASKED, now + transfer.timeout_s
            else:
                self._end(transfer)
        return sends

    def abort(self, transfer_id: str) -> list[Send]:
        """Give a transfer up, whatever its state. An unknown one is nothing to do."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            return []
        self._end(transfer)
        return [self._cancel(transfer, f"aborted at {self._pool.instance}")]

    def drop_peer(self, destination: str) -> list[str]:
        """The instance is gone: end every transfer to it and return their ids."""
        gone = [transfer for transfer in self._transfers.values() if transfer.destination == destination]
        for transfer in gone:
            self._end(transfer)
        return [transfer.offer.transfer_id for transfer in gone]

    def _cancel(self, transfer: _Outgoing, reason: str) -> Send:
        return Send(transfer.destination, Cancel(transfer.offer.transfer_id, self._pool.instance, reason))

    def _end(self, transfer: _Outgoing) -> None:
        del self._transfers[transfer.offer.transfer_id]
        self._pool.free_mem(transfer.blocks)
