"""Keys and values made by decoding go back to the instance that prefilled the prompt (paper section 5.1, step 5).

They go when the request has ended, so nobody waits for them: whole blocks only, and of these only the ones that the
other side lacks. What cannot go now is not sent later; the next turn computes it again.
"""

from jmemserve.engine.moves import Moving, Node
from jmemserve.errors import PoolError
from jmemserve.scheduler.sequence import Sequence

MAX_RETURNS = 64  # under way at once


class Returns:
    """The transfers back. Call from the instance's thread."""

    def __init__(self, node: Node):
        self._node = node
        self._under_way: set[str] = set()
        self.begun = self.skipped = self.failed = 0

    def __len__(self) -> int:
        return len(self._under_way)

    def send(self, seq: Sequence) -> None:
        """A sequence has ended and holds its blocks yet: what it made may go to its origin."""
        size = self._node.blocks.block_size
        whole = min(seq.landed, len(seq.tokens), len(seq.blocks) * size) // size
        origin = seq.origin
        if origin is None or whole <= len(seq.request.prompt) // size:
            return
        if len(self._under_way) >= MAX_RETURNS or self._node.peers.known(origin) is None:
            self.skipped += 1
            return
        tokens, blocks = seq.tokens[: whole * size], seq.blocks[:whole]
        try:
            moving = self._node.transfer_with_insert(origin, tokens, blocks, salt=seq.request.salt)
        except PoolError:
            self.skipped += 1
            return
        self.begun += 1
        self._under_way.add(moving.transfer_id)
        moving.future.add_done_callback(lambda _: self._over(moving))

    def _over(self, moving: Moving) -> None:
        self._under_way.discard(moving.transfer_id)
        self.failed += moving.future.exception() is not None
