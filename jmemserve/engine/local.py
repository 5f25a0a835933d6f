"""The instances of one process: what an instance needs around it to be a member of a cluster."""

from collections.abc import Callable

from jmemserve.config import InstanceSpec
from jmemserve.engine.build import Parts
from jmemserve.engine.compiles import CompileCounter
from jmemserve.engine.instance import Instance
from jmemserve.engine.links import Links, Neighbours, Side
from jmemserve.engine.messages import FromPeer
from jmemserve.errors import TransferError, Unavailable
from jmemserve.kvpool import transfer as tx
from jmemserve.scheduler.messages import Beat, FromInstance, Ready


class Host:
    """One instance with its links. ``say`` gets what it says to the front-end; ``on_failure`` its end, if it dies."""

    def __init__(
        self,
        spec: InstanceSpec,
        parts: Parts,
        make_links: Callable[[Side], Links],
        say: Callable[[FromInstance], None],
        on_failure: Callable[[BaseException], None],
        compiles: CompileCounter,
    ):
        self.max_model_len = parts.max_model_len
        self.instance = Instance(spec, parts, self._send, self._linked, say, on_failure, compiles)
        self.links = make_links(self)
        self.instance.drop_link = self.links.drop
        self.neighbours = Neighbours(spec.name, self.links, lambda: self.instance.pool.epoch)
        self.instance.on_roster = self.neighbours.update

    def ready(self) -> Ready:
        """What the front-end is told when all is loaded."""
        facts = (("kind of blocks", self.instance.node.peers.schema),)
        return Ready(self.links.address, facts, self.max_model_len, self.instance.costs.profile)

    def beat(self, frontend: str = "") -> Beat | None:
        """The sign of life of this moment for a front-end; None: there is none."""
        return self.instance.beat(frontend) if self.instance.alive else None

    def close(self) -> None:
        """End the thread and the links."""
        self.neighbours.close()
        self.instance.stop()

    # -- as its links see it ------------------------------------------------------------------------------------------

    def hello(self) -> tx.Hello:
        return self.instance.call(self.instance.node.peers.hello)

    def accept(self, hello: tx.Hello) -> str:
        if not self.instance.alive:
            raise TransferError(f"{self.instance.spec.name} is dead")
        try:
            return self.instance.call(lambda: self.instance.greet(hello))
        except Unavailable as error:
            raise TransferError(str(error)) from error

    def knows(self, peer: str) -> bool:
        try:
            return self.instance.call(lambda: self.instance.node.peers.known(peer) is not None)
        except Unavailable:
            return False

    def on_message(self, message: FromPeer) -> None:
        self.instance.post(message)

    def on_down(self, peer: str) -> None:
        self.instance.post(lambda: self.instance.node.link_lost(peer))

    def _linked(self, peer: str) -> bool:
        return peer in self.links.peers()

    def _send(self, peer: str, message: tx.Message) -> None:
        try:
            self.links.send(peer, message)
        except TransferError:  # the link is down, and says so in its own time
            self.instance.node.tally.dropped += 1
