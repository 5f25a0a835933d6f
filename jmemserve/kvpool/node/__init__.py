"""One pool among others: what moves bytes between media and between instances."""

from jmemserve.kvpool.node.moving import Transfer
from jmemserve.kvpool.node.node import LEASE_S, TIMEOUT_S, PoolNode
from jmemserve.kvpool.node.peers import Peer

__all__ = ["LEASE_S", "TIMEOUT_S", "Peer", "PoolNode", "Transfer"]
