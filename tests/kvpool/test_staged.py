"""What only the staged transports promise: sockets and shared memory under death, strangers, damage and crowding."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import msgpack
import numpy as np
import pytest
from transport_ways import SECRET, make_piece, sharding

from jmemserve.errors import CorruptBlock, TransferError
from jmemserve.kvpool.net.frames import Address
from jmemserve.kvpool.transports import PieceSpec
from jmemserve.kvpool.transports.shm_space import Space
from jmemserve.kvpool.transports.staged import StagedTransport, staged_shm, staged_tcp

WAYS = {"staged-shm": staged_shm, "staged-tcp": staged_tcp}


@pytest.fixture(params=WAYS)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., StagedTransport]]:
    made: list[StagedTransport] = []

    def make(*arguments: Any, **options: Any) -> StagedTransport:
        made.append(WAYS[request.param](*(arguments or (SECRET,)), **options))
        return made[-1]

    yield make
    for transport in made:
        transport.close()
        transport.close()


def blocks(n: int, nbytes: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (n, nbytes), np.uint8))


def zeros(n: int, nbytes: int) -> list[np.ndarray]:
    return list(np.zeros((n, nbytes), np.uint8))


def same(got: list[np.ndarray], want: list[np.ndarray]) -> bool:
    return all(map(np.array_equal, got, want))


class Proxy:
    """A wire between a fetcher and a server that can be touched: ``change(total so far, data)`` on the way back."""

    def __init__(self, address: str, change: Callable[[int, bytes], bytes]):
        self._target, self._change = Address.parse(address), change
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(near)
            try:
                far = socket.create_connection(self._target)
            except OSError:
                self._end([near])
                continue
            self._sockets.append(far)
            for source, target, change in ((near, far, lambda total, data: data), (far, near, self._change)):
                self._threads.append(threading.Thread(target=self._pump, args=(source, target, change)))
                self._threads[-1].start()

    def _pump(self, source: socket.socket, target: socket.socket, change: Callable[[int, bytes], bytes]) -> None:
        total = 0
        try:
            while data := source.recv(1 << 16):
                target.sendall(change(total, data))
                total += len(data)
        except OSError:
            pass
        self._end([source, target])

    def _end(self, sockets: list[socket.socket]) -> None:
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes up whoever reads

    def close(self) -> None:
        self._end([self._listener])
        self._threads[0].join()
        self._end(self._sockets)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._sockets):
            end.close()


class Peer:
    """A publisher in a process of its own."""

    def __init__(self, name: str):
        here = Path(__file__)
        self.process = subprocess.Popen(
            [sys.executable, str(here.with_name("transport_peer.py")), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(here.resolve().parents[2])},
        )
        self.endpoint = self._answer()

    def ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return msgpack.unpackb(bytes.fromhex(self.process.stdout.readline().decode()))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


# ---- both ways


def test_another_secret_reaches_nobody(make):
    here, there = make(), make(b"another")
    ticket = there.publish("k", blocks(2, 64), 2)
    assert not here.reaches(there.endpoint())
    with pytest.raises(TransferError, match="secret"):
        here.fetch(there.endpoint(), ticket, PieceSpec((2, 64), "uint8", 2), zeros(2, 64), 2.0)


def test_a_key_published_again_does_not_answer_an_old_ticket(make):
    here, there = make(), make()
    spec, target = PieceSpec((2, 64), "uint8", 2), zeros(2, 64)
    old = there.publish("k", blocks(2, 64, 1), 2)
    with pytest.raises(TransferError, match="published already"):
        there.publish("k", blocks(2, 64), 2)
    there.release("k")
    new = there.publish("k", blocks(2, 64, 2), 2)
    with pytest.raises(TransferError, match="released"):
        here.fetch(there.endpoint(), old, spec, target, 2.0)
    here.fetch(there.endpoint(), new, spec, target, 2.0)
    assert same(target, blocks(2, 64, 2))


@pytest.mark.parametrize("frame", [64, 4096, 1 << 20])
def test_large_pieces(make, frame):
    n, nbytes = 4, 5 << 20
    here, there = make(), make()
    piece, target = blocks(n, nbytes), zeros(n, nbytes)
    per_block = nbytes // max(frame, 4096)
    spec = PieceSpec((n, nbytes), "uint8", n * per_block)
    for checksum in (True, False):
        here.fetch(there.endpoint(), there.publish("k", piece, spec.frames, checksum), spec, target, 20.0)
        there.release("k")
        assert same(target, piece)
        for slot in target:
            slot[:] = 0


def test_frames_of_one_block_or_part_of_it(make):
    here, there = make(), make()
    piece = blocks(3, 96)
    with pytest.raises(TransferError, match="lie apart"):
        there.publish("k", piece, 1)
    whole = there.publish("k", np.stack(piece), 1)  # one array may travel in one frame
    with pytest.raises(TransferError, match="lie apart"):
        here.fetch(there.endpoint(), whole, PieceSpec((3, 96), "uint8", 1), zeros(3, 96), 2.0)
    got = here.fetch(there.endpoint(), whole, PieceSpec((3, 96), "uint8", 1), sharding_of_bytes(), 2.0)
    assert same(list(np.asarray(got)), piece)
    with pytest.raises(TransferError, match="contiguous"):
        there.publish("l", np.zeros((4, 6), np.uint8)[:, ::2], 4)


def sharding_of_bytes() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_many_fetches_at_a_time(make):
    here, there = make(), make()

    def one(number: int) -> bool:
        piece, target = blocks(8, 100_000, number), zeros(8, 100_000)
        spec = PieceSpec((8, 100_000), "uint8", 8 if number % 2 else 8 * 25)
        here.fetch(there.endpoint(), there.publish(f"k{number}", piece, spec.frames), spec, target, 20.0)
        there.release(f"k{number}")
        return same(target, piece)

    with ThreadPoolExecutor(4) as workers:
        assert all(workers.map(one, range(40)))
    assert here.counters.failures == there.counters.failures == 0
    assert here.counters.bytes == there.counters.bytes == 40 * 800_000


def test_closing_with_fetches_in_flight(make):
    """Each of them succeeds or fails, soon; and nothing else happens."""
    here, there = make(), make()
    spec = PieceSpec((64, 1 << 20), "uint8", 64)
    ticket = there.publish("k", blocks(64, 1 << 20), 64)
    results: list[str] = []

    def fetch() -> None:
        try:
            here.fetch(there.endpoint(), ticket, spec, zeros(64, 1 << 20), 20.0)
            results.append("done")
        except TransferError:
            results.append("failed")

    for closed in (here, there):
        threads = [threading.Thread(target=fetch) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.03)
        start = time.monotonic()
        closed.close()
        for thread in threads:
            thread.join()
        assert time.monotonic() - start < 2
    assert len(results) == 6
    with pytest.raises(TransferError, match="closed"):
        there.publish("l", blocks(1, 64), 1)


# ---- sockets


def test_a_publisher_killed_in_the_middle_of_a_fetch():
    peer, here = Peer("staged-tcp"), staged_tcp(SECRET)
    host = make_piece(16, "float32", 0)
    ticket = peer.ask("publish k 16 16 0")
    moments: list[float] = []

    def kill(total: int, data: bytes) -> bytes:
        if total + len(data) > 10_000 and not moments:  # of more than 32,000
            peer.process.kill()
            moments.append(time.monotonic())
            return data[: 10_000 - total]
        return b"" if moments else data

    proxy = Proxy(peer.endpoint["address"], kill)
    with pytest.raises(TransferError):
        here.fetch({"address": proxy.address}, ticket, PieceSpec(host.shape, "float32", 16), sharding(1), 20.0)
    assert time.monotonic() - moments[0] < 1
    proxy.close()
    here.close()
    peer.close()


@pytest.mark.parametrize("nbytes", [256, 200_000])
def test_a_bit_that_flips_on_the_wire_is_found(nbytes):
    there, here = staged_tcp(SECRET), staged_tcp(SECRET)
    piece, spec = blocks(4, nbytes), PieceSpec((4, nbytes), "uint8", 4)
    needle = piece[2][17:33].tobytes()
    hits: list[int] = []

    def flip(total: int, data: bytes) -> bytes:
        at = data.find(needle)
        if at < 0 or hits:
            return data
        hits.append(at)
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    proxy = Proxy(there.endpoint()["address"], flip)
    ticket = there.publish("k", piece, 4)
    with pytest.raises(CorruptBlock, match="frame 2 of 4"):
        here.fetch({"address": proxy.address}, ticket, spec, zeros(4, nbytes), 5.0)
    target = zeros(4, nbytes)
    here.fetch({"address": proxy.address}, ticket, spec, target, 5.0)  # only that fetch failed
    assert len(hits) == 1 and same(target, piece) and here.counters.failures == 1
    proxy.close()
    here.close()
    there.close()


def test_strange_bytes_at_the_port_hurt_nobody():
    there, here = staged_tcp(SECRET), staged_tcp(SECRET)
    strangers = [socket.create_connection(Address.parse(there.endpoint()["address"])) for _ in range(20)]
    for number, stranger in enumerate(strangers):
        if number % 2:
            stranger.sendall(random.Random(number).randbytes(1000))
    target = zeros(4, 256)
    ticket = there.publish("k", blocks(4, 256), 4)
    here.fetch(there.endpoint(), ticket, PieceSpec((4, 256), "uint8", 4), target, 5.0)
    assert same(target, blocks(4, 256))
    for stranger in strangers:
        stranger.close()
    here.close()
    there.close()


def test_a_wire_that_stops_meets_the_deadline():
    there, here = staged_tcp(SECRET), staged_tcp(SECRET)
    gone = threading.Event()
    proxy = Proxy(there.endpoint()["address"], lambda total, data: b"" if gone.is_set() or total > 50_000 else data)
    ticket = there.publish("k", blocks(4, 100_000), 4)
    start = time.monotonic()
    with pytest.raises(TransferError, match="time ran out"):
        here.fetch({"address": proxy.address}, ticket, PieceSpec((4, 100_000), "uint8", 4), zeros(4, 100_000), 0.5)
    assert 0.4 < time.monotonic() - start < 1.5
    proxy.close()
    here.close()
    there.close()


def test_a_release_during_a_fetch_fails_it_without_checksums_too():
    there, here = staged_tcp(SECRET), staged_tcp(SECRET)
    ticket = there.publish("k", blocks(64, 1 << 20), 64, False)

    def release(total: int, data: bytes) -> bytes:
        if total > 1 << 20:
            there.release("k")
        return data

    proxy = Proxy(there.endpoint()["address"], release)
    with pytest.raises(TransferError, match="closed"):
        here.fetch({"address": proxy.address}, ticket, PieceSpec((64, 1 << 20), "uint8", 64), zeros(64, 1 << 20), 9.0)
    proxy.close()
    here.close()
    there.close()


def test_connections_are_used_again():
    there, here = staged_tcp(SECRET), staged_tcp(SECRET)
    spec = PieceSpec((1, 64), "uint8", 1)
    for number in range(20):
        here.fetch(there.endpoint(), there.publish(f"k{number}", blocks(1, 64), 1), spec, zeros(1, 64), 5.0)
        with pytest.raises(TransferError, match="not published"):
            here.fetch(
                there.endpoint(), {**spec.ticket(), "key": "x", "id": b"", "sums": True}, spec, zeros(1, 64), 5.0
            )
    assert len(there._way._server._serving) == 1
    here.close()
    there.close()


def test_the_advertised_host_is_told():
    there = staged_tcp(SECRET, listen="0.0.0.0:0", advertise="localhost")
    here = staged_tcp(SECRET)
    assert there.endpoint()["address"].startswith("localhost:") and here.reaches(there.endpoint())
    here.close()
    there.close()


# ---- shared memory


def test_a_full_segment_waits_for_a_release():
    there = staged_shm(SECRET, 1 << 20, wait_s=0.3)
    with pytest.raises(TransferError, match="has only"):
        there.publish("too large", blocks(1, 2 << 20), 1)
    there.publish("a", blocks(9, 100_000), 9)
    start = time.monotonic()
    with pytest.raises(TransferError, match="no room"):
        there.publish("b", blocks(2, 100_000), 2)
    assert 0.25 < time.monotonic() - start < 1
    there.publish("c", blocks(1, 64), 1)  # what is small finds room
    timer = threading.Timer(0.1, there.release, ["a"])
    timer.start()
    there.publish("b", blocks(2, 100_000), 2)
    timer.join()
    there.release("b")
    there.release("c")
    assert there._way._space.free_bytes == (1 << 20) - 4096
    there.close()


def test_closing_ends_the_wait_for_room():
    there = staged_shm(SECRET, 1 << 20, wait_s=20.0)
    there.publish("a", blocks(9, 100_000), 9)
    threading.Timer(0.1, there.close).start()
    start = time.monotonic()
    with pytest.raises(TransferError, match="closed"):
        there.publish("b", blocks(9, 100_000), 9)
    assert time.monotonic() - start < 2


def test_memory_of_another_piece_is_never_taken_for_this():
    """Released and reused while it was copied, without checksums."""
    there, here = staged_shm(SECRET, 1 << 20), staged_shm(SECRET, 1 << 20)
    spec = PieceSpec((4, 1024), "uint8", 4)
    ticket = there.publish("k", blocks(4, 1024, 1), 4, False)
    segment = here._way._segment_of(there.endpoint())
    check, calls = segment.check, []

    def reused(piece: np.ndarray, head: bytes) -> None:
        if calls:  # the check after the copy
            there.release("k")
            there.publish("k", blocks(4, 1024, 2), 4, False)
        calls.append(1)
        check(piece, head)

    segment.check = reused
    with pytest.raises(TransferError, match="released"):
        here.fetch(there.endpoint(), ticket, spec, zeros(4, 1024), 5.0)
    here.close()
    there.close()


def test_endpoints_that_are_not_true():
    there, here = staged_shm(SECRET, 1 << 20), staged_shm(SECRET, 1 << 20)
    good = there.endpoint()
    assert here.reaches(good)
    for field, value in (("pid", 1), ("fd", 0), ("size", 1 << 30), ("nonce", bytes(32)), ("boot", "x"), ("proof", b"")):
        assert not here.reaches(good | {field: value}), field
    fresh = staged_shm(SECRET, 1 << 20)
    from jmemserve.kvpool.transports.staged_shm import _proof

    for field, value in (("pid", 2**22 + 1), ("fd", 0), ("fd", -1), ("size", 1 << 19), ("nonce", bytes(32))):
        false = good | {field: value}  # with the right proof: a former life, or a number used again
        assert not fresh.reaches(false | {"proof": _proof(SECRET, false)}), field
    there.close()
    assert not here.reaches(good) and not fresh.reaches(good)
    fresh.close()
    here.close()


def test_nothing_is_left_of_a_killed_publisher():
    peer, here = Peer("staged-shm"), staged_shm(SECRET, 1 << 20)
    before = set(os.listdir("/dev/shm"))
    ticket = peer.ask("publish k 16 16 0")
    host = make_piece(16, "float32", 0)
    spec = PieceSpec(host.shape, "float32", 16)
    got = here.fetch(peer.endpoint, ticket, spec, sharding(2), 5.0)
    assert np.asarray(got).tobytes() == host.tobytes()
    peer.process.kill()
    peer.process.wait()
    with pytest.raises(TransferError):
        here.fetch(peer.endpoint, ticket, spec, sharding(2), 5.0)
    assert set(os.listdir("/dev/shm")) <= before
    other = staged_shm(SECRET, 1 << 20)
    assert here.reaches(other.endpoint()) and len(here._way._peers) == 1  # the dead one was forgotten
    here.close()
    other.close()
    peer.close()


def test_space_is_never_given_twice():
    draw = random.Random(0)
    space = Space(4096, 4096 + 64 * 200)
    taken: dict[int, int] = {}
    for _ in range(5000):
        if taken and draw.random() < 0.5:
            start = draw.choice(list(taken))
            del taken[start]
            space.free(start)
        else:
            size = draw.randrange(1, 64 * 30)
            start = space.take(size)
            if start is not None:
                assert start % 64 == 0 and 4096 <= start and start + size <= 4096 + 64 * 200
                assert all(start + size <= other or other + length <= start for other, length in taken.items())
                taken[start] = size
        assert space.free_bytes == 64 * (200 - sum(-(-size // 64) for size in taken.values()))
    for start in taken:
        space.free(start)
    assert space.take(64 * 200) == 4096 and space.take(1) is None
