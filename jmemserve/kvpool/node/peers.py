"""Who this node is linked with, and how bytes get here from each of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jmemserve.errors import TransferError, UnknownInstance
from jmemserve.kvpool import transfer as tx
from jmemserve.kvpool.blocks import BlockPool
from jmemserve.kvpool.store import PageStore
from jmemserve.kvpool.transports import Transport, choose


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """One linked instance, in one of its lives."""

    name: str
    epoch: int
    endpoints: Mapping[str, Mapping[str, Any]]  # of its transports
    transport: Transport  # ours, the best that it has too


class Peers:
    """The linked instances by name. Two instances can link if blocks and models are alike and a transport is common."""

    def __init__(self, blocks: BlockPool, store: PageStore, transports: Sequence[Transport]):
        self.transports = list(transports)
        self._blocks = blocks
        kinds = dataclasses.asdict(store.layout) | {"checksums": store.checksum_kind, "model": blocks.model}
        for own_affair in ("aggregated", "fold"):  # how pages lie in memory
            kinds.pop(own_affair, None)
        self.schema = ", ".join(f"{name}={value}" for name, value in kinds.items())
        self._peers: dict[str, Peer] = {}

    def hello(self) -> tx.Hello:
        """What this side says first."""
        endpoints = {transport.name: transport.endpoint() for transport in self.transports}
        return tx.Hello(self._blocks.instance, self._blocks.epoch, self.schema, endpoints)

    def greet(self, hello: tx.Hello) -> Peer:
        """Link up with whoever said this. Raises TransferError: another schema, a former life, no common transport."""
        if hello.instance == self._blocks.instance:
            raise TransferError(f"the peer has our own name, {hello.instance}; give every instance another")
        if hello.schema != self.schema:
            raise TransferError(f"blocks of {hello.instance} are ({hello.schema}), ours are ({self.schema})")
        known = self._peers.get(hello.instance)
        if known is not None and hello.epoch < known.epoch:
            raise TransferError(f"{hello.instance} is in epoch {known.epoch}; {hello.epoch} is a former life")
        peer = Peer(hello.instance, hello.epoch, hello.endpoints, choose(self.transports, hello.endpoints))
        self._peers[hello.instance] = peer
        return peer

    def get(self, name: str) -> Peer:
        """The linked instance of this name. Raises UnknownInstance."""
        peer = self._peers.get(name)
        if peer is None:
            raise UnknownInstance(
                f"there is no link to an instance {name!r}; linked are {sorted(self._peers) or 'none'}"
            )
        return peer

    def known(self, name: str) -> Peer | None:
        """The linked instance of this name, if there is one."""
        return self._peers.get(name)

    def names(self) -> dict[str, str]:
        """The name of the transport towards each linked instance."""
        return {name: peer.transport.name for name, peer in self._peers.items()}

    def forget(self, name: str) -> None:
        """The link is gone for good."""
        self._peers.pop(name, None)

    def way(self, name: str, transport: object) -> tuple[Transport, Mapping[str, Any]]:
        """Our end of the transport that a peer published with, and the peer's endpoint. Raises TransferError."""
        peer = self.get(name)
        ours = next((mine for mine in self.transports if mine.name == transport), None)
        if ours is None or ours.name not in peer.endpoints:
            raise TransferError(f"{name} published with {transport!r}; common are {sorted(peer.endpoints)}")
        return ours, peer.endpoints[ours.name]
