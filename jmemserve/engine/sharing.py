"""A cached prefix goes to a peer that needs it and has less of it: cheaper there than computing it again."""

from collections.abc import Callable

from jmemserve.engine.moves import Node
from jmemserve.errors import PoolError
from jmemserve.scheduler.messages import Share, Shared

MAX_SHARES = 64  # under way at once; who asks for more computes


class Sharing:
    """Of one instance; call from its thread. Every Share is answered by a Shared, however it went."""

    def __init__(self, node: Node, say: Callable[[Shared], None]):
        self._node, self._say = node, say
        self._under_way = 0

    def share(self, message: Share) -> None:
        """Send what the peer lacks; it is asked which blocks these are, so nothing moves twice."""
        pool, answer = self._node.blocks, Shared(message.request_id)
        if self._under_way >= MAX_SHARES or self._node.peers.known(message.to) is None:
            self._say(answer)
            return
        limit = (len(message.tokens) - 1) // pool.block_size
        match = pool.hold(message.tokens, message.salt, limit)
        try:
            if not match.addresses:
                self._say(answer)
                return
            tokens = message.tokens[: match.num_tokens]
            moving = self._node.transfer_with_insert(message.to, tokens, match.addresses, salt=message.salt)
        except PoolError:
            self._say(answer)
            return
        finally:
            match.release()  # the transfer holds them
        self._under_way += 1
        moving.future.add_done_callback(lambda _: self._over(answer))

    def _over(self, answer: Shared) -> None:
        self._under_way -= 1
        self._say(answer)
