"""Blocks that one instance has at another: asked for, on a lease, given back.

Both ends of it: what peers hold for us, and what we hold for them. A lease lasts until it is renewed, by one message
per peer; what is not renewed is freed, and what is freed twice is counted and forgotten.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

from jmemserve.errors import ForeignAddress, PoolError, RemoteRefused, TransferError
from jmemserve.kvpool import transfer as tx
from jmemserve.kvpool.address import BlockAddress, Medium
from jmemserve.kvpool.blocks import BlockPool
from jmemserve.kvpool.node.peers import Peers
from jmemserve.kvpool.node.tally import Tally


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """An allocation that was asked for."""

    peer: str
    deadline: float
    future: Future[list[BlockAddress]]


class Remote:
    """Allocations between this node and its peers."""

    def __init__(
        self,
        blocks: BlockPool,
        peers: Peers,
        send: Callable[[str, tx.Message], None],
        timeout_s: float,
        lease_s: float,
        tally: Tally,
    ):
        self._blocks, self._peers, self._send = blocks, peers, send
        self._timeout_s, self._lease_s = timeout_s, lease_s
        self._calls: dict[str, _Call] = {}
        self._number = 0
        self._abroad: dict[str, set[BlockAddress]] = {}  # what peers hold for us
        self._leases: dict[str, dict[BlockAddress, float]] = {}  # what peers have here, and until when
        self._tally = tally

    # -- ours, elsewhere -----------------------------------------------------------------------------------------------

    def alloc(self, size: int, medium: Medium, peer: str, now: float) -> Future[list[BlockAddress]]:
        """Ask a peer for blocks. Raises UnknownInstance at once; the future raises RemoteRefused or TransferError."""
        self._peers.get(peer)
        self._number += 1
        call_id = f"{self._blocks.instance}.{self._blocks.epoch}.a{self._number}"
        call = _Call(peer, now + self._timeout_s, Future())
        self._calls[call_id] = call
        self._send(peer, tx.Allocate(call_id, self._blocks.instance, self._blocks.epoch, size, medium))
        return call.future

    def got(self, peer: str, addresses: Iterable[BlockAddress]) -> None:
        """These are allocated for us there."""
        self._abroad.setdefault(peer, set()).update(addresses)

    def check_free(self, addresses: list[BlockAddress]) -> None:
        """Raise UnknownInstance or ForeignAddress unless each is held for us, once."""
        for address in addresses:
            self._peers.get(address.instance)
            if address not in self._abroad.get(address.instance, ()) or addresses.count(address) > 1:
                raise ForeignAddress(f"{address} is not held once for {self._blocks.instance}")

    def free(self, addresses: list[BlockAddress]) -> None:
        """Give back what peers hold for us."""
        by_peer: dict[str, list[BlockAddress]] = {}
        for address in addresses:
            by_peer.setdefault(address.instance, []).append(address)
        for peer, group in by_peer.items():
            self._abroad[peer].difference_update(group)
            self._send(peer, tx.Free(self._blocks.instance, self._blocks.epoch, tuple(group)))

    def renew(self, *transfers: Mapping[str, list[str]]) -> None:
        """Tell every peer what of ours there is alive: these transfers, and the blocks that it holds for us."""
        ids: dict[str, list[str]] = {peer: [] for peer, addresses in self._abroad.items() if addresses}
        for table in transfers:
            for peer, transfer_ids in table.items():
                ids.setdefault(peer, []).extend(transfer_ids)
        whose = self._blocks.instance, self._blocks.epoch
        for peer, transfer_ids in ids.items():
            if self._peers.known(peer) is None:
                continue
            addresses = tuple(self._abroad.get(peer, ()))
            for start in range(0, max(1, len(addresses)), tx.RENEWED):
                part = addresses[start : start + tx.RENEWED]
                self._send(peer, tx.Renew(*whose, () if start else tuple(transfer_ids), part))

    # -- theirs, here --------------------------------------------------------------------------------------------------

    def lease(self, peer: str, addresses: Iterable[BlockAddress], now: float) -> None:
        """The peer has these blocks here from now on."""
        deadlines = dict.fromkeys(addresses, now + self._lease_s)
        if deadlines:
            self._leases.setdefault(peer, {}).update(deadlines)

    def renewed(self, peer: str, addresses: Iterable[BlockAddress], now: float) -> None:
        """The peer said that it needs these; what it does not name runs out."""
        known = self._leases.get(peer, {})
        known.update((address, now + self._lease_s) for address in addresses if address in known)

    def leases(self, now: float) -> list[tuple[str, int, float]]:
        """(peer, blocks it has here, seconds until the first of them is free) of every lease."""
        return [(peer, len(limits), min(limits.values()) - now) for peer, limits in self._leases.items()]

    def _give_back(self, peer: str, addresses: Iterable[BlockAddress]) -> int:
        """Free what the peer has here, one by one: some may be free already. How many were not."""
        known, count = self._leases.get(peer, {}), 0
        for address in addresses:
            known.pop(address, None)
            try:
                self._blocks.free_mem([address], owner=peer)
                count += 1
            except PoolError:
                self._tally.dropped += 1
        if not known:
            self._leases.pop(peer, None)
        return count

    # -- messages and time ---------------------------------------------------------------------------------------------

    def on(self, peer: str, message: tx.Allocate | tx.Allocated | tx.Free, now: float) -> None:
        """Take a message of a peer; one that makes no sense is counted and dropped."""
        match message:
            case tx.Allocate():
                self._allocate(message, now)
            case tx.Free():
                self._give_back(peer, message.addresses)
            case tx.Allocated():
                call = self._calls.get(message.call_id)
                if call is None or call.peer != peer:
                    self._tally.dropped += 1
                    if message.addresses and not message.reason:  # it came too late: nobody wants them
                        self._send(peer, tx.Free(self._blocks.instance, self._blocks.epoch, message.addresses))
                elif message.reason:
                    self._fail(message.call_id, RemoteRefused(f"{peer}: {message.reason}"))
                else:
                    self.got(peer, message.addresses)
                    self._calls.pop(message.call_id).future.set_result(list(message.addresses))

    def expire(self, now: float) -> None:
        """End calls without an answer and leases without renewal."""
        for call_id in [call_id for call_id, call in self._calls.items() if now >= call.deadline]:
            self._fail(call_id, TransferError(f"no answer for {self._timeout_s:g} s"))
        for peer, limits in list(self._leases.items()):
            late = [address for address, limit in limits.items() if now >= limit]
            self._tally.expired_leases += self._give_back(peer, late)

    def link_lost(self, peer: str) -> None:
        """No answer will come from there."""
        for call_id in [call_id for call_id, call in self._calls.items() if call.peer == peer]:
            self._fail(call_id, TransferError(f"the link to {peer} was lost"))

    def forget(self, peer: str) -> int:
        """The peer is gone for good: free what it has here, forget what we had there; how many blocks were its."""
        self.link_lost(peer)
        self._abroad.pop(peer, None)
        self._leases.pop(peer, None)
        return self._blocks.free_owned_by(peer)

    def close(self) -> None:
        """Fail every call."""
        for call_id in list(self._calls):
            self._fail(call_id, TransferError("the node was closed"))

    def _allocate(self, message: tx.Allocate, now: float) -> None:
        try:
            addresses = self._blocks.alloc_mem(message.num_blocks, message.medium, owner=message.source)
        except PoolError as error:
            answer = tx.Allocated(message.call_id, (), str(error))
        else:
            answer = tx.Allocated(message.call_id, tuple(addresses), "")
            self.lease(message.source, addresses, now)
        self._send(message.source, answer)

    def _fail(self, call_id: str, error: Exception) -> None:
        self._calls.pop(call_id).future.set_exception(error)
