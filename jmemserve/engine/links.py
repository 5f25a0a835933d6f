"""Links between instances: who dials whom, and the links within one process.

A link carries the transfer protocol's messages both ways between two instances. The cluster's roster says who is there;
the younger of two instances dials, and dials again if the link breaks.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from jmemserve.engine.messages import FromPeer
from jmemserve.errors import JmemserveError, TransferError
from jmemserve.kvpool import transfer as tx
from jmemserve.scheduler.messages import Member, Roster

AGAIN_S = 0.1
DIALS = 8  # at once


class Side(Protocol):
    """One instance as its links see it; all from any thread."""

    def hello(self) -> tx.Hello: ...

    def accept(self, hello: tx.Hello) -> str:
        """Link up with whoever said this; its name. Raises TransferError with the reason why not."""
        ...

    def knows(self, peer: str) -> bool:
        """Is the peer that was accepted still one? To be asked once its link can be dropped."""
        ...

    def on_message(self, message: FromPeer) -> None: ...

    def on_down(self, peer: str) -> None:
        """The link has ended; nothing more comes by it."""
        ...


class Links(Protocol):
    """The links of one instance."""

    address: str  # where others dial

    def connect(self, address: str) -> str:
        """Link up with the instance there, waiting for it; its name. Raises TransferError."""
        ...

    def send(self, peer: str, message: tx.Message) -> None:
        """Never blocks. Raises TransferError if there is no link."""
        ...

    def drop(self, peer: str) -> None:
        """End the link, if there is one."""
        ...

    def peers(self) -> list[str]:
        """Those whose link is up."""
        ...

    def close(self) -> None: ...


class Exchange:
    """Where the instances of one process find each other."""

    def __init__(self) -> None:
        self.links: dict[str, LocalLinks] = {}


class LocalLinks:
    """``Links`` within one process."""

    def __init__(self, name: str, side: Side, exchange: Exchange):
        self.address = f"local:{name}"
        self._name, self._side, self._exchange = name, side, exchange
        self._peers: dict[str, LocalLinks] = {}
        exchange.links[self.address] = self

    def connect(self, address: str) -> str:
        other = self._exchange.links.get(address)
        if other is None:
            raise TransferError(f"there is no instance at {address} in this process")
        peer = self._side.accept(other._side.hello())
        other._side.accept(self._side.hello())
        self._peers[peer], other._peers[self._name] = other, self
        if not (self._side.knows(peer) and other._side.knows(self._name)):
            self.drop(peer)
            raise TransferError(f"{peer} was given up while it linked up")
        return peer

    def send(self, peer: str, message: tx.Message) -> None:
        other = self._peers.get(peer)
        if other is None:
            raise TransferError(f"there is no link to {peer!r}")
        other._side.on_message(FromPeer(self._name, message))

    def drop(self, peer: str) -> None:
        other = self._peers.pop(peer, None)
        if other is None:
            return
        if other._peers.pop(self._name, None) is not None:
            other._side.on_down(self._name)
        self._side.on_down(peer)  # what was sent and not yet read is lost for this side too

    def peers(self) -> list[str]:
        return list(self._peers)

    def close(self) -> None:
        self._exchange.links.pop(self.address, None)
        for peer in list(self._peers):
            self.drop(peer)


class Neighbours:
    """Keeps the links of one instance as the newest roster wants them, on a thread of its own."""

    def __init__(self, name: str, links: Links, epoch: Callable[[], int]):
        self._name, self._links, self._epoch = name, links, epoch
        self._changed = threading.Condition()
        self._roster: Roster | None = None
        self._stopped = False
        self._dialling: set[str] = set()
        self._dialers = ThreadPoolExecutor(DIALS, f"{name}-dial")
        self._thread = threading.Thread(target=self._run, name=f"{name}-links", daemon=True)
        self._thread.start()

    def update(self, roster: Roster) -> None:
        """The cluster has changed; from any thread."""
        with self._changed:
            if self._roster is None or roster.version > self._roster.version:
                self._roster = roster
                self._changed.notify()

    def await_roster(self) -> None:
        """Rosters of another front-end will come, which counts from the start; until then all stays as it is."""
        with self._changed:
            self._roster = None

    def reset(self) -> None:
        """This instance begins another life, perhaps under another front-end: all links end."""
        self.await_roster()
        for peer in self._links.peers():
            self._links.drop(peer)

    def close(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
        self._dialers.shutdown(wait=False, cancel_futures=True)
        self._links.close()

    def _run(self) -> None:
        seen = -1
        while True:
            with self._changed:
                if not self._stopped and (self._roster is None or self._roster.version == seen):
                    self._changed.wait(AGAIN_S)
                if self._stopped:
                    return
                roster = self._roster
            if roster is not None:
                seen = roster.version
                self._arrange(roster)

    def _arrange(self, roster: Roster) -> None:
        wanted = {member.name: member for member in roster.members if member.name != self._name and member.address}
        for peer in self._links.peers():
            if peer not in wanted:  # of a former life of a peer the instance itself lets go
                self._links.drop(peer)
        up = set(self._links.peers())
        for name, member in wanted.items():
            if name not in up and name not in self._dialling and self._dials(member):
                self._dialling.add(name)  # on a thread of its own: one that hangs must not keep others waiting
                self._dialers.submit(self._dial, member)

    def _dial(self, member: Member) -> None:
        try:
            self._links.connect(member.address)
        except JmemserveError:
            pass  # it may come up yet; the roster says so if it will not
        finally:
            self._dialling.discard(member.name)

    def _dials(self, other: Member) -> bool:
        return (self._epoch(), self._name) > (other.epoch, other.name)
