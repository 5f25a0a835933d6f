"""Sequences that go to other instances and those that come from them: their blocks travel, their state beside them."""

from collections import abc
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from jmemserve.engine.handover import pack_sequence, unpack_sequence
from jmemserve.errors import PoolError, TransferError
from jmemserve.kvpool import BlockAddress, BlockPool
from jmemserve.kvpool import transfer as tx
from jmemserve.scheduler.local import LocalScheduler
from jmemserve.scheduler.sequence import Sequence


class Moving(Protocol):
    """A transfer under way."""

    transfer_id: str
    future: Future[list[BlockAddress]]


class Peers(Protocol):
    """Who can be reached."""

    def known(self, instance: str) -> object | None: ...


class Node(Protocol):
    """What moves, returns and shares need of a ``PoolNode``; the simulator has one of its own."""

    @property
    def blocks(self) -> BlockPool: ...

    @property
    def peers(self) -> Peers: ...

    def transfer_with_insert(
        self,
        instance: str,
        tokens: abc.Sequence[int],
        source: abc.Sequence[BlockAddress],
        *,
        flags: tx.Flags = tx.Flags.NONE,
        private: bytes | None = b"",
        salt: str = "",
    ) -> Moving: ...

    def free_mem(self, addresses: abc.Sequence[BlockAddress]) -> None: ...

    def abort(self, transfer_id: str) -> None: ...


class Moves:
    """Of one instance; call from its thread. ``gone(seq)`` is told of a sequence that lives elsewhere now."""

    def __init__(self, name: str, node: Node, scheduler: LocalScheduler, gone: Callable[[Sequence], None]):
        self._name, self._node, self._scheduler, self._gone = name, node, scheduler, gone
        self._moving: dict[str, Sequence] = {}  # by transfer id

    def hand_over(self, seq: Sequence, origin: str | None, now: float) -> None:
        """Offer a sequence whose tokens are all computed but the last to the instance that is to decode it.

        ``origin``: who wants back what is made there. If nobody takes it, the sequence goes on here.
        """
        assert seq.decode_hint is not None and seq.landed == len(seq.tokens) - 1, (seq.decode_hint, seq.landed)
        seq.stamps.left = now
        tokens, private = seq.tokens[: seq.landed], pack_sequence(seq, now, origin)
        blocks = self._scheduler.hand_blocks_over(seq)
        try:
            moving = self._node.transfer_with_insert(
                seq.decode_hint, tokens, blocks, flags=tx.Flags.CLAIM, private=private, salt=seq.request.salt
            )
        except PoolError:  # its link went down since the step was planned
            self._scheduler.stay(seq)
            return
        finally:
            self._node.free_mem(blocks)  # the transfer holds them
        self._moving[moving.transfer_id] = seq
        moving.future.add_done_callback(lambda _: self._moved(moving))

    def give_up(self, seq: Sequence) -> None:
        """The sequence ends: so does its move, if it is on its way."""
        for transfer_id in [key for key, other in self._moving.items() if other is seq]:
            del self._moving[transfer_id]
            self._node.abort(transfer_id)

    def take_in(self, arrived: tx.Arrived, now: float) -> Sequence:
        """The sequence that came, every block of it in place. Raises TransferError if its state makes no sense."""
        try:  # its state was written just before the offer was sent
            seq = unpack_sequence(arrived.private, arrived.tokens or (), self._name, arrived.offered)
        except TransferError:
            self._node.free_mem(arrived.blocks)
            raise
        seq.stamps.adopted = now
        return seq

    def _moved(self, moving: Moving) -> None:
        """A move has ended. If it failed, this instance goes on: any instance can catch up any sequence."""
        seq = self._moving.pop(moving.transfer_id, None)
        if seq is None:
            return  # it was given up
        if moving.future.exception() is None:
            self._gone(seq)
            self._scheduler.leave(seq)
        else:
            self._scheduler.stay(seq)
