"""Two pools in two real processes: every transport, and kill -9 of either side in every state of a transfer."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool_process import SECRET, contents, make_pool, tokens_of

from jmemserve.errors import TransferError
from jmemserve.kvpool.net.frames import Address
from jmemserve.kvpool.net.link import SocketLink
from jmemserve.kvpool.pool import MemPool
from jmemserve.kvpool.transfer import Flags

WAYS = ["staged-shm", "staged-tcp", "jax"]
KILLED = ["staged-tcp", pytest.param("staged-shm", marks=pytest.mark.slow)]
NUMBERS = list(range(6))


class Other:
    """The other process."""

    def __init__(self, name: str, way: str, tp: int = 1, listen: str = "127.0.0.1:0"):
        command = [sys.executable, str(Path(__file__).with_name("pool_process.py")), name, way, str(tp), listen]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._rest = b""
        self.address = self.hear()["address"]

    def hear(self, timeout_s: float = 60) -> dict[str, Any]:
        """The next line that it prints."""
        assert self.process.stdout is not None
        limit = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, limit - time.monotonic()))
            assert ready, "the other process says nothing"
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            assert more, f"the other process ended with {self.process.wait(5)}"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def tell(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, do: str, **arguments: Any) -> Any:
        self.tell(do, **arguments)
        answer = self.hear()
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["answer"]

    def kill(self) -> None:
        """kill -9, also of one that was stopped."""
        self.process.kill()
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """start("pool", ...) or start("other", ...); all are ended with the test."""
    pools: list[MemPool] = []
    others: list[Other] = []

    def make(what: str, *arguments: Any, **keywords: Any) -> Any:
        if what == "pool":
            pools.append(make_pool(*arguments, **keywords))
            return pools[-1]
        others.append(Other(*arguments, **keywords))
        return others[-1]

    yield make
    for other in others:
        other.kill()
    for pool in pools:
        pool.close()


def fill(pool: MemPool, numbers: list[int]) -> None:
    blocks = pool.alloc_mem(len(numbers))
    pool.write(blocks, contents(numbers))
    pool.insert(tokens_of(numbers), blocks)
    pool.free_mem(blocks)


def send(pool: MemPool, numbers: list[int], to: str, flags: Flags = Flags.NONE):
    with pool.match([*tokens_of(numbers), 0]) as found:
        return pool.transfer_with_insert(to, tokens_of(numbers), found.addresses, flags=flags)


def wait_quiet(pool: MemPool, timeout_s: float = 10) -> None:
    """Nothing is held and nothing is under way, soon."""
    limit = time.monotonic() + timeout_s
    while True:
        memory, moved = pool.stats()
        state = (memory.hbm.held, memory.dram.held, moved.transfers_in, moved.transfers_out)
        if state == (0, 0, 0, 0):
            break
        assert time.monotonic() < limit, f"still {state}: {pool}"
        time.sleep(0.01)
    pool.check()


def wait_held(other: Other, blocks: int) -> None:
    """The other process holds so many blocks and nothing is under way, soon."""
    limit = time.monotonic() + 10
    while (state := other.ask("held")) != [blocks, 0]:
        assert time.monotonic() < limit, state
        time.sleep(0.01)


def works(pool: MemPool, other: Other, salt: int) -> None:
    """Blocks go both ways, byte for byte."""
    mine, theirs = [100 + salt, 101 + salt], [110 + salt, 111 + salt, 112 + salt]
    fill(pool, mine)
    send(pool, mine, "other").result(20)
    assert other.ask("read", numbers=mine)[:2] == [2, True]
    other.ask("fill", numbers=theirs)
    assert other.ask("send", numbers=theirs, to="here") == 3
    with pool.match([*tokens_of(theirs), 0]) as found:
        assert (pool.read(found.addresses) == contents(theirs)).all() and len(found.addresses) == 3
    wait_quiet(pool)
    wait_held(other, 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ours, theirs", [(1, 2), (2, 1)])
def test_blocks_go_both_ways_by_every_transport(start, way: str, ours: int, theirs: int) -> None:
    pool, other = start("pool", "here", way, ours), start("other", "other", way, theirs)
    assert pool.connect(other.address) == "other" and f"other by {way}" in repr(pool)
    works(pool, other, 0)
    fill(pool, NUMBERS)
    for number, granularity in enumerate(("by_layer", "by_request", "by_request_agg")):
        numbers = [40 + 10 * number + i for i in range(7)]
        other.ask("fill", numbers=numbers)
        other.ask("send", numbers=numbers, to="here", granularity=granularity, flags=int(Flags.DRAM))
        with pool.match([*tokens_of(numbers), 0]) as found:
            assert (pool.read(found.addresses) == contents(numbers)).all() and len(found.addresses) == 7
    send(pool, NUMBERS, "other", Flags.MIXED).result(20)
    before = pool.stats()[1].bytes_out
    send(pool, [*NUMBERS], "other").result(20)  # all is there already
    assert pool.stats()[1].bytes_out == before
    mine = pool.alloc_mem(3, instance="other")
    wait_held(other, 3)  # and for a moment what is copied to DRAM ahead of need
    pool.free_mem(mine)
    wait_quiet(pool)
    wait_held(other, 0)
    assert pool.stats()[1].corrupt == 0


RECEIVING = [("handling", "Offer"), ("sending", "Accept"), ("handling", "Data"), ("sending", "Landed")]
RECEIVING += [("handling", "Close"), ("sending", "Done")]
SENDING = [("sending", "Offer"), ("handling", "Accept"), ("sending", "Data"), ("handling", "Landed")]
SENDING += [("sending", "Close"), ("handling", "Done")]


@pytest.mark.parametrize("way", KILLED)
def test_kill_9_of_the_receiver_in_every_state(start, way: str) -> None:
    """The survivor has no block held, its transfer fails, and a new life of the peer is served."""
    pool = start("pool", "here", way)
    fill(pool, NUMBERS)
    for where, kind in RECEIVING:
        other = start("other", "other", way)
        pool.connect(other.address)
        other.ask("freeze", where=where, kind=kind)
        moving = send(pool, NUMBERS, "other")
        assert other.hear() == {"frozen": kind}
        other.kill()
        with pytest.raises(TransferError):
            moving.result(10)
        pool.forget_peer("other")
        wait_quiet(pool)
        with pool.match([*tokens_of(NUMBERS), 0]) as found:
            assert found.num_tokens == 24
    other = start("other", "other", way)
    pool.connect(other.address)
    works(pool, other, 0)


@pytest.mark.parametrize("way", KILLED)
def test_kill_9_of_the_sender_in_every_state(start, way: str) -> None:
    pool = start("pool", "here", way)
    for where, kind in SENDING:
        other = start("other", "other", way)
        pool.connect(other.address)
        other.ask("fill", numbers=NUMBERS)
        other.ask("freeze", where=where, kind=kind)
        other.tell("send", numbers=NUMBERS, to="here", wait=False)
        heard = other.hear()
        while "frozen" not in heard:
            heard = other.hear()
        time.sleep(0.05)  # what was under way here goes on a little
        other.kill()
        pool.forget_peer("other")
        wait_quiet(pool)
        with pool.match([*tokens_of(NUMBERS), 0]) as found:  # all of it or nothing, and never wrong bytes
            possible = {"Done": {6}, "Landed": {0, 6}}.get(kind, {0})  # Close goes out before the bytes are taken
            assert len(found.addresses) in possible, (where, kind)
            assert (pool.read(found.addresses) == contents(NUMBERS[: len(found.addresses)])).all()
        pool.delete(tokens_of(NUMBERS[:1]))
        wait_quiet(pool)
    other = start("other", "other", way)
    pool.connect(other.address)
    works(pool, other, 0)


def test_a_peer_that_is_stopped_meets_the_deadline(start) -> None:
    """Lesson 3: SIGSTOP closes no socket; the states end by themselves, and what it had here by its lease."""
    pool = start("pool", "here", "staged-tcp", timeout_s=1.0)
    other = start("other", "other", "staged-tcp")
    pool.connect(other.address)
    fill(pool, NUMBERS)
    theirs = other.ask("alloc", n=3, at="here")
    assert len(theirs) == 3 and pool.stats()[0].hbm.held == 3
    other.process.send_signal(signal.SIGSTOP)
    with pytest.raises(TransferError, match="no answer"):
        send(pool, NUMBERS, "other").result(10)
    wait_quiet(pool)
    assert pool.stats()[1].expired_leases == 3
    other.process.send_signal(signal.SIGCONT)
    works(pool, other, 0)


def test_a_restarted_peer_on_the_same_address_is_another_epoch(start) -> None:
    """Lesson 14: what it had is freed, and it is served at once."""
    pool, other = start("pool", "here", "staged-tcp"), start("other", "other", "staged-tcp")
    address = other.address
    other.ask("connect", address=pool.address)
    assert len(other.ask("alloc", n=4, at="here")) == 4
    other.kill()
    again = start("other", "other", "staged-tcp", listen=address)
    assert again.address == address
    again.ask("connect", address=pool.address)
    assert pool.stats()[0].hbm.held == 0
    works(pool, again, 0)


def test_strangers_are_kept_out(start) -> None:
    pool, other = start("pool", "here", "staged-tcp"), start("other", "other", "staged-tcp")
    stranger = SocketLink(
        b"hello",
        b"another secret",
        listen="127.0.0.1:0",
        accept=lambda hello: "?",
        on_message=lambda peer, raw: None,
        on_down=lambda peer: None,
    )
    with pytest.raises(TransferError):
        stranger.connect(pool.address, 5.0)
    stranger.close()
    host, port = Address.parse(pool.address)
    for noise in (b"GET / HTTP/1.0\r\n\r\n", os.urandom(4096), b"\0" * 64):
        with socket.create_connection((host, port), 5) as wire:
            wire.sendall(noise)
    assert SECRET.decode() not in repr(pool)
    pool.connect(other.address)
    works(pool, other, 0)
