"""Before an instance serves, it and every other one move blocks to each other: what cannot work is known at once."""

import dataclasses
from collections.abc import Callable

from jmemserve.errors import JmemserveError
from jmemserve.kvpool.address import BlockAddress
from jmemserve.kvpool.node import PoolNode, Transfer
from jmemserve.scheduler.messages import Probed

TRY_S = 60.0  # to link up and move blocks
AGAIN_S = 0.2


@dataclasses.dataclass(slots=True)
class _Probe:
    limit: float
    again: float
    error: str = "no link"
    thorough: bool = False


class Prober:
    """The probes of one instance. Call from its thread; ``say`` gets one Probed per probe."""

    def __init__(self, node: PoolNode, say: Callable[[Probed], None], linked: Callable[[str], bool]):
        self._node, self._say, self._linked = node, say, linked
        self._open: dict[str, _Probe] = {}

    def begin(self, peer: str, thorough: bool, now: float) -> None:
        """Probe this peer, once there is a link; with a block, or with pieces of every size."""
        self._open[peer] = _Probe(now + TRY_S, now, thorough=thorough)
        self.poll(now)

    def forget(self, peer: str) -> None:
        """The peer is gone."""
        self._open.pop(peer, None)

    def poll(self, now: float) -> None:
        """Try those again that could not be tried or failed."""
        for peer, probe in list(self._open.items()):
            if now >= probe.limit:
                del self._open[peer]
                self._say(Probed(peer, probe.error))
            elif now >= probe.again and self._node.peers.known(peer) is not None and self._linked(peer):
                probe.again = probe.limit  # until this try is over
                self._try(peer, probe, now)

    def _try(self, peer: str, probe: _Probe, now: float) -> None:
        sizes, free = self._node.store.sizes, self._node.blocks.free
        fitting = [total for n in range(1, len(sizes) + 1) if (total := sum(sizes[:n])) <= free]
        thorough, probe.thorough = probe.thorough, False  # the other side may be too full for all
        blocks: list[BlockAddress] = []
        try:
            blocks = self._node.blocks.alloc_mem(max(fitting, default=1) if thorough else 1)
            moving = self._node.transfer(peer, blocks)
        except JmemserveError as error:
            self._node.free_mem(blocks)
            self._failed(peer, str(error), now)
            return
        moving.future.add_done_callback(lambda _: self._over(peer, moving, blocks, now))

    def _over(self, peer: str, moving: Transfer, blocks: list[BlockAddress], began: float) -> None:
        error = moving.future.exception()
        self._node.free_mem(blocks)
        if error is not None:
            self._failed(peer, str(error), began)
            return
        self._node.free_mem(moving.result(0))
        if self._open.pop(peer, None) is not None:
            self._say(Probed(peer, "", self._node.peers.get(peer).transport.name))

    def _failed(self, peer: str, error: str, now: float) -> None:
        probe = self._open.get(peer)
        if probe is not None:
            probe.error, probe.again = error, now + AGAIN_S
