"""MemPool: the paper's elastic memory pool for whoever wants one: a test, a tool, a cache service (paper section 4).

    exchange = LocalExchange()
    with MemPool("a", layout, 64, 256, exchange=exchange) as a, MemPool("b", layout, 64, exchange=exchange) as b:
        a.link(b)                                   # or, between processes: a.connect(address of b)
        blocks = a.alloc_mem(4)
        a.write(blocks, array)                      # [4, L, 2, K, C, H]
        a.insert(tokens, blocks)
        a.transfer_with_insert("b", tokens, blocks).result(5)

It is a ``PoolNode`` with a thread of its own, so that its verbs can be called from any thread. They wait for the
pool's thread, never for a peer, but for those that say so; what takes time returns a ``Transfer``. An engine does
not use this class: its own thread is the owner of its ``PoolNode``.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import jax
import numpy as np
from jax.sharding import Mesh

from jmemserve.errors import ConfigError, TransferError, Unavailable
from jmemserve.kernels.pages import PageLayout
from jmemserve.kvpool import transfer as tx
from jmemserve.kvpool.address import BlockAddress, Medium
from jmemserve.kvpool.arena import make_arena
from jmemserve.kvpool.blocks import BlockPool
from jmemserve.kvpool.events import EventLog
from jmemserve.kvpool.lease import Match
from jmemserve.kvpool.net.codec import Codec
from jmemserve.kvpool.net.link import SocketLink
from jmemserve.kvpool.node import LEASE_S, TIMEOUT_S, PoolNode, Transfer
from jmemserve.kvpool.stats import NodeStats, PoolStats
from jmemserve.kvpool.store import PageStore
from jmemserve.kvpool.transfer import Flags, Granularity
from jmemserve.kvpool.transports import Transport
from jmemserve.kvpool.transports.local import LocalExchange, LocalTransport
from jmemserve.kvpool.transports.staged import staged_shm, staged_tcp

POLL_S = 0.02  # how often time is looked at
CALL_S = 60.0  # a call of the pool's thread that takes longer is given up

MESSAGES = Codec(
    {
        number: kind
        for number, kind in enumerate(
            (
                tx.Hello,
                tx.Offer,
                tx.Accept,
                tx.Refuse,
                tx.Data,
                tx.Landed,
                tx.Close,
                tx.Done,
                tx.Cancel,
                tx.Allocate,
                tx.Allocated,
                tx.Free,
                tx.Renew,
            )
        )
    }
)


class MemPool:
    """One pool with its memory, its thread and its links."""

    def __init__(
        self,
        instance: str,
        layout: PageLayout,
        num_blocks: int,
        dram_blocks: int = 0,
        mesh: Mesh | None = None,
        exchange: LocalExchange | None = None,
        transports: Callable[[PageStore], Sequence[Transport]] | None = None,
        model: str = "",
        quota: tuple[int | None, int | None] | None = None,
        listen: str | None = None,
        secret: bytes = b"",
        on_arrival: Callable[[tx.Arrived], None] = lambda arrived: None,
        timeout_s: float = TIMEOUT_S,
        lease_s: float = LEASE_S,
    ):
        """``mesh`` has an axis "model" and defaults to the first device.

        Pools of one process that share an ``exchange`` reach each other; ``listen`` ("host:port", port 0 for any)
        accepts links from other processes that know the ``secret``, over shared memory or TCP. ``transports(store)``
        makes other ways instead. ``on_arrival`` is called on the pool's thread. Raises ConfigError.
        """
        if listen is not None and not secret:
            raise ConfigError("a pool that listens needs a secret that its peers know too")
        self.instance = instance
        mesh = mesh if mesh is not None else Mesh(np.array(jax.devices()[:1]), ("model",))
        blocks = BlockPool(
            instance, time.time_ns(), num_blocks, layout.block_size, dram_blocks, model, quota, EventLog()
        )
        store = PageStore(layout, num_blocks, mesh)
        arena = make_arena(layout, dram_blocks, mesh) if dram_blocks else None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._routes: dict[str, Callable[[bytes], None]] = {}
        self._failure: BaseException | None = None
        ways = transports(store) if transports is not None else _ways(store, exchange, secret)
        self.node = PoolNode(blocks, store, arena, ways, self._inbox.put, self._send, on_arrival, timeout_s, lease_s)
        self._thread = threading.Thread(target=self._run, name=f"pool-{instance}", daemon=True)
        self._thread.start()
        self._socket: SocketLink | None = None
        if listen is not None:
            self._socket = SocketLink(
                MESSAGES.encode(self.node.peers.hello()),
                secret,
                listen=listen,
                accept=self._accept,
                on_message=self._from_socket,
                on_down=lambda peer: self._inbox.put(lambda: self.node.link_lost(peer)),
            )

    # -- the paper's verbs ---------------------------------------------------------------------------------------------

    def alloc_mem(self, size: int, medium: Medium = Medium.HBM, instance: str | None = None) -> list[BlockAddress]:
        """See ``PoolNode.alloc_mem``; waits for the peer's answer if it is a peer's memory."""
        return self._call(lambda: self.node.alloc_mem(size, medium, instance)).result(CALL_S)

    def free_mem(self, addresses: Sequence[BlockAddress]) -> None:
        """See ``PoolNode.free_mem``."""
        self._call(lambda: self.node.free_mem(addresses))

    def insert(
        self, tokens: Sequence[int], addresses: Sequence[BlockAddress], salt: str = "", adapter: str = ""
    ) -> list[BlockAddress]:
        """See ``BlockPool.insert``."""
        return self._call(lambda: self.node.blocks.insert(tokens, addresses, salt, adapter))

    def match(self, tokens: Sequence[int], salt: str = "", adapter: str = "") -> Match:
        """See ``BlockPool.match``; the lease may be released from any thread."""
        found = self._call(lambda: self.node.blocks.match(tokens, salt, adapter))
        num_tokens = found.num_tokens
        return Match(self.free_mem, found.take(), num_tokens)

    def delete(self, tokens: Sequence[int], salt: str = "", adapter: str = "") -> int:
        """See ``BlockPool.delete``."""
        return self._call(lambda: self.node.blocks.delete(tokens, salt, adapter))

    def swap_out(self, num_blocks: int) -> int:
        """See ``PoolNode.swap_out``; waits until the bytes are in DRAM."""
        return self._call(lambda: self.node.swap_out(num_blocks)).result(CALL_S)

    def swap_in(self, addresses: Sequence[BlockAddress]) -> list[BlockAddress]:
        """See ``PoolNode.swap_in``; waits until the bytes are in HBM."""
        return self._call(lambda: self.node.swap_in(addresses)).result(CALL_S)

    def transfer(
        self,
        instance: str,
        source: Sequence[BlockAddress],
        destination: Sequence[BlockAddress] | None = None,
        flags: Flags = Flags.NONE,
        private: bytes | None = b"",
        granularity: Granularity = Granularity.AUTO,
        ready: int | None = None,
    ) -> Transfer:
        """See ``PoolNode.transfer``."""
        return self._call(lambda: self.node.transfer(instance, source, destination, flags, private, granularity, ready))

    def transfer_with_insert(
        self,
        instance: str,
        tokens: Sequence[int],
        source: Sequence[BlockAddress],
        destination: Sequence[BlockAddress] | None = None,
        flags: Flags = Flags.NONE,
        private: bytes | None = b"",
        granularity: Granularity = Granularity.AUTO,
        ready: int | None = None,
        salt: str = "",
        adapter: str = "",
    ) -> Transfer:
        """See ``PoolNode.transfer_with_insert``."""
        return self._call(
            lambda: self.node.transfer_with_insert(
                instance, tokens, source, destination, flags, private, granularity, ready, salt, adapter
            )
        )

    def more(self, transfer: Transfer, ready: int) -> None:
        """See ``PoolNode.more``."""
        self._call(lambda: self.node.more(transfer.transfer_id, ready))

    def close_transfer(self, transfer: Transfer, private: bytes) -> None:
        """See ``PoolNode.close_transfer``."""
        self._call(lambda: self.node.close_transfer(transfer.transfer_id, private))

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def write(self, addresses: Sequence[BlockAddress], blocks: np.ndarray) -> None:
        """Put bytes into blocks that the caller holds: [n, L, 2, K, C, H]. Raises StaleAddress or ForeignAddress."""
        self._call(lambda: self.node.write(addresses, blocks))

    def read(self, addresses: Sequence[BlockAddress]) -> np.ndarray:
        """The bytes of blocks that the caller holds: [n, L, 2, K, C, H]. Raises StaleAddress or ForeignAddress."""
        return self._call(lambda: self.node.read(addresses))

    # -- links ---------------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str | None:
        """Where other processes reach this pool, if it listens."""
        return self._socket.address if self._socket is not None else None

    def link(self, other: "MemPool") -> str:
        """Link up with a pool of this process; the name of the transport. Raises TransferError with the reason."""
        way = self._greet(other)
        other._greet(self)
        return way

    def _greet(self, other: "MemPool") -> str:
        hello = other._call(other.node.peers.hello)
        self._routes[other.instance] = lambda raw: other._take(self.instance, raw)
        return self._call(lambda: self.node.greet(hello)).transport.name

    def connect(self, address: str, timeout_s: float = 10.0) -> str:
        """Link up with a pool of another process; its name. Raises TransferError with the reason."""
        if self._socket is None:
            raise Unavailable("this pool was made without `listen`, so it has no links to other processes")
        return self._socket.connect(address, timeout_s)

    def forget_peer(self, instance: str) -> int:
        """See ``PoolNode.forget_peer``."""
        return self._call(lambda: self.node.forget_peer(instance))

    def _accept(self, raw: bytes) -> str:
        """On a thread of the link: another process says hello."""
        hello = MESSAGES.decode(raw)
        if not isinstance(hello, tx.Hello):
            raise Unavailable("the first message of a link must be a hello")
        peer = self._call(lambda: self.node.greet(hello))
        socket = self._socket
        assert socket is not None
        self._routes[peer.name] = lambda raw: socket.send(peer.name, raw)
        return peer.name

    def _from_socket(self, peer: str, raw: bytes) -> None:
        self._take(peer, raw)

    def _take(self, peer: str, raw: bytes) -> None:
        def handle() -> None:
            try:
                message = MESSAGES.decode(raw)
            except TransferError:
                self.node.tally.dropped += 1
                return
            self.node.handle(peer, message)

        self._inbox.put(handle)

    def _send(self, peer: str, message: tx.Message) -> None:
        try:
            self._routes[peer](MESSAGES.encode(message))
        except TransferError:  # the link is down, and says so in its own time
            self.node.tally.dropped += 1

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _call[T](self, function: Callable[[], T]) -> T:
        """Call on the pool's thread and wait."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        if self._failure is not None or not self._thread.is_alive():
            raise Unavailable(f"the pool {self.instance} is closed or has failed: {self._failure!r}")
        self._inbox.put(work)
        return future.result(CALL_S)

    def _run(self) -> None:
        try:
            polled = 0.0
            while True:
                try:
                    work = self._inbox.get(timeout=POLL_S)
                    if work is None:
                        return
                    work()
                except queue.Empty:
                    pass
                now = time.monotonic()
                if now - polled >= POLL_S:
                    self.node.poll(now)
                    polled = now
        except BaseException as error:  # a bug: whoever calls next is told
            self._failure = error
            raise

    def stats(self) -> tuple[PoolStats, NodeStats]:
        """Counts: of the memory, and of what moved."""
        return self._call(lambda: (self.node.blocks.stats(), self.node.stats()))

    def check(self) -> None:
        """See ``BlockPool.check``."""
        self._call(self.node.blocks.check)

    def __repr__(self) -> str:
        ways = self.node.peers.names()
        peers = ", ".join(f"{name} by {way}" for name, way in ways.items()) or "no peers"
        return f"{self.node.blocks!r:.300}".replace("BlockPool", "MemPool")[:-1] + f"; {peers}>"

    def close(self) -> None:
        """End the thread, the links and the workers. Twice is fine."""
        if self._socket is not None:
            self._socket.close()
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join(timeout=CALL_S)
            self.node.close()

    def __enter__(self) -> "MemPool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _ways(store: PageStore, exchange: LocalExchange | None, secret: bytes) -> list[Transport]:
    """How blocks can come here: within the process, and from others that know the secret."""
    ways: list[Transport] = []
    if exchange is not None:
        ways.append(LocalTransport(exchange, store.checksums))
    if secret:
        if sys.platform == "linux":
            ways.append(staged_shm(secret))
        ways.append(staged_tcp(secret))
    return ways
