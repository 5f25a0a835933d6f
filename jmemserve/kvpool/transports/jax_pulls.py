"""Pulls from transfer servers of JAX that end in time, whatever the peer does.

``timeout=`` of JAX does nothing; what ends a pull is to poison its connection, which ends all pulls on it, hence one
connection for each pull under way. But poisoning one that is still being made (the peer is stopped, or swamped) leaves
the peer's server deaf for everybody, for ever (seen with jaxlib 0.12.0). So a connection that never brought anything
and is late is set aside, and poisoned when a later one has shown that the peer is well.

    new ──pull──▶ proven, idle ──pull──▶ proven, idle ...
     │ late           │ late, or an error
     ▼                ▼
    set aside ──▶ poisoned (or dropped, once its pull has ended by itself)
"""

import dataclasses
import socket
import threading
import time
from collections import OrderedDict, deque
from typing import Any

import jax

from jmemserve.errors import TransferError
from jmemserve.kvpool.transports.checks import is_ready, wait_ready

PROBE_S = 1.0  # for a TCP connection that tells whether anybody listens at all
SETTLED_S = 1.0  # this long after the peer was seen well, connections that were begun before are made
MAX_ASIDE = 32  # connections; beyond, the oldest is dropped and its pull ends with the peer
MAX_REMEMBERED = 65_536  # ids that were pulled


@dataclasses.dataclass(slots=True)
class _Connection:
    address: str
    raw: Any
    leaves: list[jax.Array] = dataclasses.field(default_factory=list)  # of the pull under way
    proven: bool = False  # it has brought a piece: both ends have made it
    peer_well: float | None = None  # since when the peer is known to be well, for one that is set aside


class Puller:
    """Connections of one transport; ``server`` is the process's own transfer server, which makes them."""

    def __init__(self, server: Any):
        self._server = server
        self._pulled: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._idle: dict[str, list[_Connection]] = {}  # by address; all proven
        self._aside: deque[_Connection] = deque()
        self._closed = False
        self._lock = threading.Lock()

    def pull(self, address: str, uuid: int, shapes: list[jax.ShapeDtypeStruct], deadline: float) -> list[jax.Array]:
        """The arrays published under the id, ready. An id is pulled once, ever: a second pull would hang.

        Raises TransferError at the deadline, for an id pulled before, and for all that goes wrong at the peer.
        """
        connection = self._connect(address, deadline)
        self._use_up(uuid)
        try:
            connection.leaves = connection.raw.pull(uuid, shapes)
            wait_ready(connection.leaves, deadline)
        except BaseException:
            self._give_up(connection)
            raise
        leaves, connection.leaves = connection.leaves, []
        self._keep(connection)
        return leaves

    def close(self) -> None:
        """Let all connections go."""
        with self._lock:
            self._closed = True
            self._idle.clear()
            self._aside.clear()

    def _connect(self, address: str, deadline: float) -> _Connection:
        with self._lock:
            if self._closed:
                raise TransferError("this transport is closed")
            idle = self._idle.get(address)
            if idle:
                return idle.pop()
        # JAX connects in the background and tries for ever: look first whether anybody is there.
        if not listens(address, min(PROBE_S, deadline - time.monotonic())):
            raise TransferError(f"nobody listens at {address}")
        return _Connection(address, self._server.connect(address))

    def _use_up(self, uuid: int) -> None:
        with self._lock:
            if uuid in self._pulled:
                raise TransferError(f"piece {uuid} was fetched already")
            self._pulled[uuid] = None
            while len(self._pulled) > MAX_REMEMBERED:
                self._pulled.popitem(last=False)

    def _keep(self, connection: _Connection) -> None:
        """It worked: its peer is well, and it can be used again."""
        connection.proven = True
        now = time.monotonic()
        late = []
        with self._lock:
            if not self._closed:
                self._idle.setdefault(connection.address, []).append(connection)
            for other in list(self._aside):
                if all(is_ready(leaf) for leaf in other.leaves):
                    self._aside.remove(other)
                elif other.address == connection.address:
                    other.peer_well = other.peer_well or now
                    if now - other.peer_well > SETTLED_S:
                        self._aside.remove(other)
                        late.append(other)
        for other in late:
            other.raw._poison_connection()

    def _give_up(self, connection: _Connection) -> None:
        """It did not work: end its pull, now or later."""
        under_way = not all(is_ready(leaf) for leaf in connection.leaves)
        if connection.proven or not under_way:
            connection.raw._poison_connection()
            return
        with self._lock:
            self._aside.append(connection)
            if len(self._aside) > MAX_ASIDE:
                self._aside.popleft()


def listens(address: str, timeout_s: float) -> bool:
    """Whether a TCP connection to host:port can be made in that time; nothing is sent."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=max(timeout_s, 1e-3)):
            return True
    except (OSError, ValueError, OverflowError):
        return False
