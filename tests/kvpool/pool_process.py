"""The other process of test_two_processes.py: a MemPool that obeys JSON lines on stdin and answers on stdout.

It can be told to freeze when a message of some type is about to be handled or sent: there it waits to be killed.
"""

import json
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jmemserve.kernels.pages import PageLayout
from jmemserve.kvpool import Medium
from jmemserve.kvpool.address import BlockAddress
from jmemserve.kvpool.pool import MemPool
from jmemserve.kvpool.store import PageStore
from jmemserve.kvpool.transfer import Flags, Granularity
from jmemserve.kvpool.transports import Transport
from jmemserve.kvpool.transports.jax_server import JaxServer, JaxTransport
from jmemserve.kvpool.transports.staged import staged_shm, staged_tcp

SECRET = b"known to both processes"
LAYOUT = PageLayout(2, 4, 4, 8, "float32")


def make_pool(name: str, way: str, tp: int = 1, listen: str = "127.0.0.1:0", timeout_s: float = 30.0) -> MemPool:
    """A pool of 32 blocks in HBM and 32 in DRAM with one transport."""

    def ways(store: PageStore) -> list[Transport]:
        if way == "jax":
            return [JaxTransport(JaxServer(jax.devices()[0]), jax.devices()[0], store.checksums)]
        return [staged_shm(SECRET) if way == "staged-shm" else staged_tcp(SECRET)]

    mesh = Mesh(np.array(jax.devices()[:tp]), ("model",))
    return MemPool(
        name,
        LAYOUT,
        32,
        32,
        mesh,
        transports=ways,
        listen=listen,
        secret=SECRET,
        timeout_s=timeout_s,
        lease_s=timeout_s,
    )


def contents(numbers: list[int]) -> np.ndarray:
    """Blocks that say in every head who they are: [n, L, 2, K, C, H]."""
    heads = np.arange(LAYOUT.num_kv_heads).reshape(1, 1, 1, -1, 1, 1)
    own = np.array(numbers).reshape(-1, 1, 1, 1, 1, 1) * 8 + heads
    return np.broadcast_to(own, (len(numbers), *LAYOUT.page_shape)).astype(np.float32)


def tokens_of(numbers: list[int]) -> list[int]:
    return [4 * number + i for number in numbers for i in range(4)]


def say(value: dict) -> None:
    """A line for the test. In one write: two threads say something."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


class Freezer:
    """Stops this process's pool at a message of the given type, going out or coming in."""

    def __init__(self, pool: MemPool, where: str, kind: str):
        self.kind = kind
        if where == "sending":
            self.inner = pool.node._send
            pool.node._send = pool.node.remote._send = self.send  # type: ignore[method-assign]
        else:
            self.handle_inner = pool.node.handle
            pool.node.handle = self.handle  # type: ignore[method-assign]

    def send(self, peer: str, message: Any) -> None:
        self.stop_at(message)
        self.inner(peer, message)

    def handle(self, peer: str, message: Any) -> None:
        self.stop_at(message)
        self.handle_inner(peer, message)

    def stop_at(self, message: Any) -> None:
        if type(message).__name__ == self.kind:
            say({"frozen": self.kind})
            time.sleep(600)


def obey(pool: MemPool, command: dict[str, Any]) -> Any:
    """One command; blocks are named by their numbers, addresses travel as lists."""
    match command.pop("do"):
        case "connect":
            return pool.connect(command["address"])
        case "freeze":
            Freezer(pool, command["where"], command["kind"])
            return None
        case "fill":  # cache these blocks
            blocks = pool.alloc_mem(len(command["numbers"]))
            pool.write(blocks, contents(command["numbers"]))
            pool.insert(tokens_of(command["numbers"]), blocks)
            pool.free_mem(blocks)
            return None
        case "send":  # cached blocks, to a peer
            found = pool.match([*tokens_of(command["numbers"]), 0])
            moving = pool.transfer_with_insert(
                command["to"],
                tokens_of(command["numbers"]),
                found.addresses,
                flags=Flags(command.get("flags", 0)),
                granularity=Granularity(command.get("granularity", "auto")),
                private=b"hello",
            )
            found.release()
            return None if not command.get("wait", True) else len(moving.result(20))
        case "read":  # are these blocks cached, with the right bytes?
            with pool.match([*tokens_of(command["numbers"]), 0]) as found:
                count = len(found.addresses)
                good = bool((pool.read(found.addresses) == contents(command["numbers"][:count])).all())
                return [count, good, sorted({Medium(a.medium).name for a in found.addresses})]
        case "alloc":
            return [list(a) for a in pool.alloc_mem(command["n"], instance=command["at"])]
        case "free":
            pool.free_mem([BlockAddress(a[0], a[1], Medium(a[2]), a[3], a[4]) for a in command["addresses"]])
            return None
        case "held":
            memory, moved = pool.stats()
            pool.check()
            return [memory.hbm.held + memory.dram.held, moved.transfers_in + moved.transfers_out]
    raise AssertionError(command)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    name, way, tp, listen = sys.argv[1:5]
    pool = make_pool(name, way, int(tp), listen)
    say({"address": pool.address})
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"answer": obey(pool, json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        say(answer)
    pool.close()


if __name__ == "__main__":
    main()
