"""The contract that every transport keeps, whatever carries the bytes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import msgpack
import numpy as np
import pytest
from transport_ways import NAMES, L, checksums, is_there, make_piece, make_transport, sharding

from jmemserve.errors import CorruptBlock, TransferError
from jmemserve.kvpool.transports import Counters, PieceSpec, choose, spec_of
from jmemserve.kvpool.transports.checks import sums_of
from jmemserve.kvpool.transports.jax_pulls import Puller

TIMEOUT_S = 10.0


class Pair:
    """A source and a destination of one kind in this process."""

    def __init__(self, name: str):
        self.name = name
        self.source, self.destination = make_transport(name), make_transport(name)
        self.endpoint = wire(self.source.endpoint())
        assert self.destination.reaches(self.endpoint)

    def fetch(self, ticket: dict[str, Any], spec: PieceSpec, where: Any, timeout_s: float = TIMEOUT_S) -> Any:
        return self.destination.fetch(self.endpoint, ticket, spec, where, timeout_s)

    def close(self) -> None:
        self.source.close()
        self.destination.close()


def skip_unless_there(name: str) -> None:
    if not is_there(name):
        pytest.skip(f"there is no transport {name} yet")


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    skip_unless_there(request.param)
    pair = Pair(request.param)
    yield pair
    pair.close()


def wire(value: Any) -> Any:
    """As it arrives at the other side."""
    packed = msgpack.packb(value)
    assert len(packed) < 65_536, "tickets and endpoints are small"
    return msgpack.unpackb(packed)


def aggregated(host: np.ndarray) -> PieceSpec:
    return PieceSpec(host.shape, str(host.dtype), host.shape[0])


def discrete(host: np.ndarray) -> PieceSpec:
    return PieceSpec(host.shape, str(host.dtype), host.shape[0] * 2 * L)


def as_slots(host: np.ndarray) -> list[np.ndarray]:
    """Blocks as they lie in an arena: contiguous each, in no order."""
    arena = np.zeros((2 * len(host) + 1, *host.shape[1:]), host.dtype)
    slots = [arena[2 * place + 1] for place in reversed(range(len(host)))]
    for slot, block in zip(slots, host, strict=True):
        slot[...] = block
    return slots


def same_bytes(got: Any, want: np.ndarray) -> bool:
    return np.asarray(got).tobytes() == want.tobytes()


def round_trip(pair: Pair, piece: Any, host: np.ndarray, spec: PieceSpec, where: Any, key: str) -> None:
    ticket = wire(pair.source.publish(key, piece, spec.frames))
    result = pair.fetch(ticket, spec, where)
    if isinstance(where, list):
        assert result is None
        result = np.stack(where)
    else:
        assert result.sharding == where
    assert same_bytes(result, host), (pair.name, spec)
    pair.source.release(key)


@pytest.mark.parametrize("tp", [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (2, 2)], ids=str)
def test_device_to_device(pair, tp):
    here, there = sharding(tp[0]), sharding(tp[1], 4)
    for dtype in ("float32", "bfloat16", "int8"):
        for n in (1, 4, 16):
            host = make_piece(n, dtype, n)
            for spec in (aggregated(host), discrete(host)):
                round_trip(pair, jax.device_put(host, here), host, spec, there, f"{dtype} {spec}")


@pytest.mark.parametrize("kinds", ["device slots", "slots device", "slots slots", "array device", "array slots"])
def test_host_to_and_from(pair, kinds):
    source, destination = kinds.split()
    for dtype in ("float32", "bfloat16", "int8"):
        for n in (1, 3, 16):
            host = make_piece(n, dtype, n)
            for tp in (1, 4):
                spec = (aggregated if tp == 1 else discrete)(host)
                sources = {"device": jax.device_put(host, sharding(tp)), "slots": as_slots(host), "array": host.copy()}
                where = as_slots(np.zeros_like(host)) if destination == "slots" else sharding(tp, 2)
                round_trip(pair, sources[source], host, spec, where, f"{dtype} {n} {tp}")


def test_padded_pieces_travel_whole(pair):
    """Three blocks in a piece of four: the slot of the padding is nobody's, as the first of an arena is."""
    host = make_piece(4, "float32", 5)
    arena = np.zeros((8, *host.shape[1:]), host.dtype)
    where = [arena[5], arena[2], arena[7], arena[0]]
    round_trip(pair, jax.device_put(host, sharding(2)), host, aggregated(host), where, "padded")
    assert not arena[[1, 3, 4, 6]].any()


def test_a_result_does_not_change_with_its_source(pair):
    host = make_piece(4, "float32", 1)
    for tp in (1, 2):
        slots = as_slots(host)
        ticket = wire(pair.source.publish(f"s{tp}", slots, 4))
        arrived = pair.fetch(ticket, aggregated(host), sharding(tp))
        pair.source.release(f"s{tp}")
        for slot in slots:
            slot[...] = 99
        assert same_bytes(arrived, host)


def test_source_and_result_live_and_die_apart(pair):
    """Also where one is only another name of the other's memory: overwritten in place, or deleted."""
    host = make_piece(4, "float32", 1)
    overwrite = jax.jit(lambda blocks: blocks * 0 - 1, donate_argnums=0)
    for order in (0, 1):
        piece = jax.block_until_ready(jax.jit(lambda blocks: blocks + 0)(jax.device_put(host, sharding(1))))
        arrived = pair.fetch(wire(pair.source.publish(f"k{order}", piece, 4)), aggregated(host), sharding(1, 1))
        pair.source.release(f"k{order}")
        first, second = (piece, arrived) if order else (arrived, piece)
        jax.block_until_ready(overwrite(first))
        assert same_bytes(second, host)
        if not first.is_deleted():
            first.delete()
        assert same_bytes(second, host)


def test_the_piece_stays_the_publishers(pair):
    host = make_piece(4, "float32", 1)
    piece = jax.device_put(host, sharding(1))
    for frames in (1, 4):
        pair.source.publish("k", piece, frames)
        pair.source.release("k")
    assert same_bytes(piece, host)


def test_unknown_and_released_keys_fail(pair):
    host = make_piece(2, "float32", 0)
    ticket = wire(pair.source.publish("gone", as_slots(host), 2))
    pair.source.release("gone")
    pair.source.release("gone")
    pair.source.release("never was")
    start = time.monotonic()
    with pytest.raises(TransferError):
        pair.fetch(ticket, aggregated(host), sharding(1), timeout_s=2.0)
    for field in ("key", "uuid"):
        if field in ticket:
            other = ticket | {field: "nobody's" if field == "key" else 12345}
            with pytest.raises(TransferError):
                pair.fetch(other, aggregated(host), sharding(1), timeout_s=0.5)
    assert time.monotonic() - start < 4
    assert pair.destination.counters.failures >= 1
    round_trip(pair, as_slots(host), host, aggregated(host), sharding(1), "next")


def test_a_second_fetch_fails_or_gives_the_same(pair):
    host = make_piece(2, "float32", 0)
    ticket = wire(pair.source.publish("twice", as_slots(host), 2))
    assert same_bytes(pair.fetch(ticket, aggregated(host), sharding(1)), host)
    start = time.monotonic()
    try:
        assert same_bytes(pair.fetch(ticket, aggregated(host), sharding(2), timeout_s=2.0), host)
    except TransferError:
        pass
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("checksum", [True, False], ids=["checked", "unchecked"])
def test_another_piece_than_expected_is_refused_before_bytes_move(pair, checksum):
    host = make_piece(4, "float32", 0)
    ticket = wire(pair.source.publish("k", jax.device_put(host, sharding(2)), 4, checksum))
    shape = host.shape
    for spec in (
        PieceSpec((2, *shape[1:]), "float32", 2),
        PieceSpec((*shape[:2], 2, shape[4], shape[3], shape[5]), "float32", 2),
        PieceSpec(shape, "int32", 4),
        PieceSpec(shape, "float32", 4 * 2 * L),
    ):
        with pytest.raises(TransferError):
            pair.fetch(ticket, spec, sharding(1), timeout_s=2.0)
    for slots in (as_slots(host)[:3], as_slots(host.astype(np.int32)), as_slots(host[..., :4])):
        with pytest.raises(TransferError):
            pair.fetch(ticket, aggregated(host), slots, timeout_s=2.0)
    assert pair.destination.counters.bytes == 0
    assert pair.destination.counters.failures == 7
    assert same_bytes(pair.fetch(ticket, aggregated(host), sharding(4)), host)


def test_tickets_of_strangers_fail_cleanly(pair):
    """Fields that are missing, of another type, or of another peer."""
    host = make_piece(2, "float32", 0)
    ticket = wire(pair.source.publish("k", as_slots(host), 2))
    for field in ticket:
        for value in (None, -1, "x", b"x", [], {}, 2**62):
            changed = ticket | {field: value}
            if changed == ticket:
                continue
            try:
                got = pair.fetch(changed, aggregated(host), sharding(1), timeout_s=0.2)
            except TransferError:
                continue
            assert same_bytes(got, host), (field, value)
            break  # a field that does not decide; where a ticket is good for one fetch, it is used up now
    for endpoint in ({}, {field: None for field in pair.endpoint}, {field: "x" for field in pair.endpoint}):
        assert not pair.destination.reaches(endpoint)
        with pytest.raises(TransferError):
            pair.destination.fetch(endpoint, ticket, aggregated(host), sharding(1), 0.5)


def test_corruption_is_found(pair, monkeypatch):
    host = make_piece(4, "float32", 3)
    for where in (sharding(1), sharding(2), as_slots(host)):
        slots = as_slots(host)
        ticket = wire(pair.source.publish("k", slots, 4))
        with monkeypatch.context() as patch:
            CORRUPT[pair.name](pair, slots, patch)
            with pytest.raises(CorruptBlock):
                pair.fetch(ticket, aggregated(host), where)
        pair.source.release("k")
    assert pair.destination.counters.failures == 3
    round_trip(pair, as_slots(host), host, aggregated(host), sharding(1), "next")


def _corrupt_local(pair, slots, patch):
    slots[2].view(np.uint8)[0, 0, 0, 0, 0] ^= 1  # memory is all there is between the two


def _corrupt_jax(pair, slots, patch):
    puller = pair.destination._get_puller()
    pull = puller.pull

    def flipped(self, *arguments):
        leaves = pull(*arguments)
        leaves[2] = leaves[2].at[0, 1, 1].add(1.0)
        return leaves

    patch.setattr(Puller, "pull", flipped)


def _corrupt_shm(pair, slots, patch):
    memory = pair.source._way._memory
    place = memory.tobytes().index(slots[2].tobytes())
    memory[place] ^= 1


CORRUPT = {
    "local": _corrupt_local,
    "jax": _corrupt_jax,
    "staged-shm": _corrupt_shm,
    "staged-tcp": _corrupt_local,  # what is published is sent from where it lies
}


def test_frames_are_counted_at_both_ends(pair):
    host = make_piece(4, "float32", 0)
    round_trip(pair, as_slots(host), host, aggregated(host), sharding(1), "a")
    round_trip(pair, jax.device_put(host, sharding(1)), host, discrete(host), sharding(1), "b")
    for counters in (pair.source.counters, pair.destination.counters):
        assert (counters.network_calls, counters.bytes) == (4 + 4 * 2 * L, 2 * host.nbytes)
        assert counters.failures == 0


def test_fetches_run_side_by_side(pair):
    def one(seed: int) -> bool:
        host = make_piece(4, "float32", seed)
        spec = discrete(host) if seed % 2 else aggregated(host)
        key = f"k{seed}"
        piece = as_slots(host) if seed % 3 else jax.device_put(host, sharding(2))
        ticket = wire(pair.source.publish(key, piece, spec.frames))
        where = as_slots(np.zeros_like(host)) if seed % 4 == 0 else sharding(1 + seed % 2)
        got = pair.fetch(ticket, spec, where)
        pair.source.release(key)
        return same_bytes(np.stack(where) if got is None else got, host)

    with ThreadPoolExecutor(4) as workers:
        assert all(workers.map(one, range(24)))
    assert pair.destination.counters.failures == 0


def test_closed_means_closed(pair):
    host = make_piece(2, "float32", 0)
    ticket = wire(pair.source.publish("k", as_slots(host), 2))
    pair.source.close()
    pair.source.close()
    with pytest.raises(TransferError):
        pair.source.publish("l", as_slots(host), 2)
    with pytest.raises(TransferError):
        pair.fetch(ticket, aggregated(host), sharding(1), timeout_s=1.0)
    pair.destination.close()
    with pytest.raises(TransferError):
        pair.fetch(ticket, aggregated(host), sharding(1), timeout_s=1.0)
    pair.source.release("k")


# ---- two processes


class Peer:
    """The publishing end in a process of its own."""

    def __init__(self, name: str):
        script = Path(__file__).with_name("transport_peer.py")
        root = Path(__file__).resolve().parents[2]
        self.process = subprocess.Popen(
            [sys.executable, str(script), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
        )
        self.endpoint = self._answer()

    def ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return msgpack.unpackb(bytes.fromhex(self.process.stdout.readline()))


REMOTE = [name for name in NAMES if name != "local"]


@pytest.fixture(params=REMOTE)
def far(request: pytest.FixtureRequest) -> Iterator[tuple[Peer, Any]]:
    skip_unless_there(request.param)
    peer, here = Peer(request.param), make_transport(request.param)
    yield peer, here
    here.close()
    peer.close()


def test_between_processes(far):
    peer, here = far
    assert here.reaches(peer.endpoint)
    for seed, n in enumerate((1, 16)):
        host = make_piece(n, "float32", seed)
        for spec in (aggregated(host), discrete(host)):
            for where in (sharding(1), sharding(4), as_slots(host)):
                ticket = peer.ask(f"publish k {n} {spec.frames} {seed}")
                got = here.fetch(peer.endpoint, ticket, spec, where, TIMEOUT_S)
                assert same_bytes(np.stack(where) if got is None else got, host)
                assert peer.ask("release k") is None


def test_a_peer_killed_before_the_fetch(far):
    peer, here = far
    host = make_piece(16, "float32", 0)
    tickets = [peer.ask(f"publish k{number} 16 16 0") for number in range(3)]
    assert same_bytes(here.fetch(peer.endpoint, tickets[0], aggregated(host), sharding(1), TIMEOUT_S), host)
    peer.kill()
    for ticket in tickets[1:]:  # the first finds a broken connection, the second none
        start = time.monotonic()
        with pytest.raises(TransferError):
            here.fetch(peer.endpoint, ticket, aggregated(host), sharding(1), TIMEOUT_S)
        assert time.monotonic() - start < 2
    assert not here.reaches(peer.endpoint)


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "first"])
def test_a_peer_killed_during_the_fetch(far, linked):
    """It is stopped, so that the fetch cannot be over before the kill (unless it needs no living peer)."""
    peer, here = far
    host = make_piece(16, "float32", 0)
    tickets = [peer.ask(f"publish k{number} 16 16 0") for number in range(2)]
    if linked:
        here.fetch(peer.endpoint, tickets[0], aggregated(host), sharding(1), TIMEOUT_S)
    peer.process.send_signal(signal.SIGSTOP)
    outcome: list[Any] = []

    def fetch() -> None:
        try:
            outcome.append(here.fetch(peer.endpoint, tickets[1], aggregated(host), sharding(1), TIMEOUT_S))
        except TransferError as error:
            outcome.append(error)

    worker = threading.Thread(target=fetch)
    worker.start()
    time.sleep(0.3)
    peer.kill()
    worker.join(timeout=2)
    assert not worker.is_alive()
    assert isinstance(outcome[0], TransferError) or same_bytes(outcome[0], host)


def test_a_silent_peer_meets_the_deadline(far):
    peer, here = far
    host = make_piece(16, "float32", 0)
    tickets = [peer.ask(f"publish k{number} 16 16 0") for number in range(2)]
    peer.process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    try:
        assert same_bytes(here.fetch(peer.endpoint, tickets[0], aggregated(host), sharding(1), 0.5), host)
    except TransferError:
        pass
    assert time.monotonic() - start < 1.5
    peer.process.send_signal(signal.SIGCONT)
    assert same_bytes(here.fetch(peer.endpoint, tickets[1], aggregated(host), sharding(1), TIMEOUT_S), host)


# ---- choosing, and the values


class Fake:
    """A transport that only says what it reaches."""

    def __init__(self, name: str, platform: str = "cpu", reached: bool = True):
        self.name, self.platform, self.reached = name, platform, reached
        self.counters = Counters()

    def endpoint(self) -> dict[str, Any]:
        return {"platform": self.platform}

    def reaches(self, endpoint: Any) -> bool:
        return self.reached


@pytest.mark.parametrize(
    ("mine", "theirs", "chosen"),
    [
        ([Fake("staged-tcp"), Fake("jax"), Fake("staged-shm"), Fake("local")], NAMES, "local"),
        ([Fake("staged-tcp"), Fake("jax"), Fake("staged-shm"), Fake("local", reached=False)], NAMES, "staged-shm"),
        ([Fake("staged-tcp"), Fake("jax")], NAMES, "staged-tcp"),
        ([Fake("staged-tcp"), Fake("jax", "gpu")], NAMES, "jax"),
        ([Fake("staged-tcp"), Fake("jax", "gpu", reached=False)], NAMES, "staged-tcp"),
        ([Fake("staged-tcp", reached=False), Fake("jax")], NAMES, "jax"),
        ([Fake("staged-tcp"), Fake("jax")], ("local", "jax"), "jax"),
    ],
)
def test_the_best_common_way_is_chosen(mine, theirs, chosen):
    platform = next((way.platform for way in mine if way.name == "jax"), "cpu")
    assert choose(mine, {name: {"platform": platform} for name in theirs}).name == chosen


def test_jax_is_not_preferred_when_one_end_is_a_cpu():
    mine = [Fake("jax", "gpu"), Fake("staged-tcp")]
    assert choose(mine, {"jax": {"platform": "cpu"}, "staged-tcp": {}}).name == "staged-tcp"


def test_no_common_way_names_both_lists():
    with pytest.raises(TransferError, match=r"\['jax', 'local'\].*\['staged-shm'\]"):
        choose([Fake("jax"), Fake("local")], {"staged-shm": {}})


def test_a_spec_that_can_never_work():
    for shape, frames in (((), 1), ((0, 4), 1), ((4, 4), 0), ((4, 4), 3), ((4, 4), 32)):
        with pytest.raises(TransferError):
            PieceSpec(shape, "float32", frames)
    with pytest.raises(TransferError, match="alike"):
        spec_of([np.zeros(3), np.zeros(4)], 1)
    with pytest.raises(TransferError, match="alike"):
        spec_of([], 1)
    spec = PieceSpec((4, 6), "bfloat16", 8)
    assert (spec.num_blocks, spec.nbytes, spec.frame_bytes) == (4, 48, 6)


def test_checksums_of_a_list_are_those_of_the_array():
    host = make_piece(5, "bfloat16", 0)
    assert sums_of(checksums, as_slots(host)) == sums_of(checksums, host) == checksums(host).tobytes()
