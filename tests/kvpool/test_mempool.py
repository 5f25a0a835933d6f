"""MemPool as a plain client sees it, in one process: the paper's nine verbs, and every wrong call."""

import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jmemserve.errors import (
    ConfigError,
    CorruptBlock,
    ForeignAddress,
    InvalidAddresses,
    InvalidTokens,
    InvalidTransfer,
    PoolFull,
    RemoteRefused,
    StaleAddress,
    TransferError,
    Unavailable,
    UnknownInstance,
)
from jmemserve.kernels.pages import PageLayout
from jmemserve.kvpool import BlockAddress, Flags, Granularity, Medium
from jmemserve.kvpool import transfer as tx
from jmemserve.kvpool.pool import MemPool
from jmemserve.kvpool.transports.local import LocalExchange

LAYOUT = PageLayout(3, 2, 4, 8, "float32")
C, L = LAYOUT.block_size, LAYOUT.num_layers


@pytest.fixture
def make(request: pytest.FixtureRequest):
    exchange = LocalExchange()

    def pool(name: str, num_blocks: int = 16, dram: int = 16, layout: PageLayout = LAYOUT, **kwargs) -> MemPool:
        mesh = Mesh(np.array([jax.devices()[len(made)]]), ("model",))
        made.append(MemPool(name, layout, num_blocks, dram, mesh, exchange=exchange, **kwargs))
        request.addfinalizer(made[-1].close)
        return made[-1]

    made: list[MemPool] = []
    return pool


@pytest.fixture
def two(make) -> tuple[MemPool, MemPool]:
    a, b = make("a"), make("b")
    assert a.link(b) == "local"
    return a, b


def data(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, *LAYOUT.page_shape)).astype(np.float32)


def held(pool: MemPool) -> int:
    memory, _ = pool.stats()
    return memory.hbm.held + memory.dram.held


def soon(condition) -> None:
    limit = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_the_nine_verbs(two) -> None:
    a, b = two
    tokens, bytes_ = list(range(3 * C + 2)), data(3)
    blocks = a.alloc_mem(3)
    a.write(blocks, bytes_)
    assert a.insert(tokens, blocks) == []
    a.free_mem(blocks)
    with a.match([*tokens, 9, 9]) as found:
        assert found.num_tokens == 3 * C and (a.read(found.addresses) == bytes_).all()
    assert a.swap_out(3) == 3
    lease = a.match([*tokens, 9, 9])
    assert {address.medium for address in lease.addresses} == {Medium.DRAM}
    back = a.swap_in(lease.take())
    assert {address.medium for address in back} == {Medium.HBM} and (a.read(back) == bytes_).all()
    there = a.transfer("b", back).result(5)
    assert {address.instance for address in there} == {"b"} and (b.read(there) == bytes_).all()
    a.free_mem(there)  # from afar
    soon(lambda: held(b) == 0)
    a.transfer_with_insert("b", tokens, back).result(5)
    assert b.match([*tokens, 9]).num_tokens == 3 * C
    assert a.delete(tokens[:C]) == 6  # three blocks, each in both media
    a.free_mem(back)
    assert held(a) == 0
    a.check(), b.check()


@pytest.mark.parametrize("source", [Medium.HBM, Medium.DRAM])
@pytest.mark.parametrize("target", [Flags.NONE, Flags.DRAM, Flags.MIXED])
@pytest.mark.parametrize(
    "granularity, transfers, networks",
    [
        (Granularity.BY_LAYER, 2 * L, 2 * L),
        (Granularity.BY_REQUEST, 1, 2 * L),
        (Granularity.BY_REQUEST_AGG, 1, 1),
        (Granularity.AUTO, 1, 1),
    ],
)
def test_media_and_calls_are_those_of_the_paper(two, source, target, granularity, transfers, networks) -> None:
    """Section 4: 2L / 1 / 1 transfer calls, and 2L / 2L / 1 network calls per block of tokens."""
    a, b = two
    bytes_ = data(7)
    blocks = a.alloc_mem(7, source)
    a.write(blocks, bytes_)
    there = a.transfer("b", blocks, flags=target, granularity=granularity).result(5)
    assert (b.read(there) == bytes_).all()
    assert {address.medium for address in there} == {Medium.DRAM if target is Flags.DRAM else Medium.HBM}
    _, moved = a.stats()
    assert (moved.transfer_calls, moved.network_calls) == (transfers, networks * 7)
    assert moved.bytes_out == b.stats()[1].bytes_in == bytes_.nbytes
    a.free_mem([*blocks, *there])
    soon(lambda: held(b) == 0)


def test_destinations_allocated_before(two) -> None:
    a, b = two
    theirs = a.alloc_mem(4, Medium.DRAM, "b")
    assert {(address.instance, address.medium) for address in theirs} == {("b", Medium.DRAM)}
    mine, bytes_ = a.alloc_mem(4), data(4)
    a.write(mine, bytes_)
    assert a.transfer("b", mine, theirs).result(5) == theirs
    assert (b.read(theirs) == bytes_).all()
    with pytest.raises(RemoteRefused, match="100 blocks needed"):
        a.alloc_mem(100, instance="b")
    a.free_mem([*theirs, *mine])
    soon(lambda: held(b) == 0)
    with pytest.raises(ForeignAddress):
        a.free_mem(theirs)


def test_only_what_is_lacking_travels_and_private_arrives(make) -> None:
    arrivals: list[tx.Arrived] = []
    a, b = make("a"), make("b", on_arrival=arrivals.append)
    a.link(b)
    tokens = list(range(6 * C))
    blocks = a.alloc_mem(6)
    a.write(blocks, data(6))
    a.transfer_with_insert("b", tokens[: 4 * C], blocks[:4], private=b"first").result(5)
    before = a.stats()[1].bytes_out
    a.transfer_with_insert("b", tokens, blocks, flags=Flags.CLAIM, private=b"second").result(5)
    assert a.stats()[1].bytes_out - before == 2 * LAYOUT.bytes_per_block
    assert [(arrival.private, len(arrival.blocks)) for arrival in arrivals] == [(b"first", 0), (b"second", 6)]
    assert (b.read(arrivals[1].blocks) == data(6)).all()
    b.free_mem(arrivals[1].blocks)
    a.transfer_with_insert("b", tokens, blocks, flags=Flags.ALL_BLOCKS).result(5)
    assert a.stats()[1].bytes_out - before == 8 * LAYOUT.bytes_per_block
    a.free_mem(blocks)
    assert held(a) == held(b) == 0


def test_blocks_stream_while_later_ones_are_made(two) -> None:
    a, b = two
    tokens, bytes_ = list(range(6 * C)), data(6)
    blocks = a.alloc_mem(6)
    a.write(blocks[:2], bytes_[:2])
    moving = a.transfer_with_insert("b", tokens, blocks, ready=2, private=None)
    soon(lambda: b.stats()[1].bytes_in == 2 * LAYOUT.bytes_per_block)
    for ready in (3, 6):
        a.write(
            blocks[ready - 1 : ready] if ready == 3 else blocks[3:],
            bytes_[ready - 1 : ready] if ready == 3 else bytes_[3:],
        )
        a.more(moving, ready)
        soon(lambda ready=ready: b.stats()[1].bytes_in == ready * LAYOUT.bytes_per_block)
        assert not moving.done() and b.match(tokens).num_tokens == 0
    a.close_transfer(moving, b"the end")
    moving.result(5)
    with b.match([*tokens, 0]) as found:
        assert (b.read(found.addresses) == bytes_).all()
    a.free_mem(blocks)
    assert held(a) == held(b) == 0


def test_leases(make) -> None:
    """Blocks at a peer live as long as somebody says that they are needed."""
    a, b = make("a", lease_s=0.3), make("b", lease_s=0.3)
    a.link(b)
    mine = a.alloc_mem(3, instance="b")
    time.sleep(1.0)
    assert held(b) == 3 and b._call(lambda: b.node.remote.leases(time.monotonic()))[0][:2] == ("a", 3)
    a.close()  # nobody renews any more
    soon(lambda: held(b) == 0)
    assert b.stats()[1].expired_leases == 3 and len(mine) == 3
    b.check()


def test_blocks_whose_address_got_lost_run_out(make) -> None:
    """The answer never came, or was forgotten: a sign of life for other blocks does not keep these."""
    a, b = make("a", lease_s=0.3), make("b", lease_s=0.3)
    a.link(b)
    kept, lost = a.alloc_mem(2, instance="b"), a.alloc_mem(3, instance="b")
    a._call(lambda: a.node.remote._abroad["b"].difference_update(lost))
    soon(lambda: held(b) == 2)
    time.sleep(0.6)
    assert held(b) == 2 and b.stats()[1].expired_leases == 3
    a.free_mem(kept)
    soon(lambda: held(b) == 0)
    b.check()


def test_a_dead_peers_blocks_come_back_when_membership_says_so(two) -> None:
    a, b = two
    a.alloc_mem(3, instance="b")
    assert b.forget_peer("a") == 3 and held(b) == 0
    with pytest.raises(UnknownInstance):
        b.alloc_mem(1, instance="a")


@pytest.mark.parametrize("medium", [Medium.HBM, Medium.DRAM])
def test_corrupt_bytes_fail_that_transfer_alone(two, medium) -> None:
    """Lesson 8."""
    a, b = two
    blocks = a.alloc_mem(2, medium)
    a.write(blocks, data(2))
    [transport] = a.node.peers.transports
    publish = transport.publish

    def corrupting(key, piece, frames, checksum=True):
        ticket = publish(key, piece, frames, checksum)
        return ticket | {"sums": bytes(len(ticket["sums"]))} if checksum else ticket

    transport.publish = corrupting  # type: ignore[method-assign]
    with pytest.raises(TransferError, match="CorruptBlock"):
        a.transfer("b", blocks).result(5)
    a.transfer("b", blocks, flags=Flags.NO_CHECKSUM).result(5)  # waived: nobody looks
    transport.publish = publish  # type: ignore[method-assign]
    assert b.stats()[1].corrupt in (1, 2) and held(b) == 2  # two pieces
    there = a.transfer("b", blocks).result(5)
    assert (b.read(there) == data(2)).all()
    a.free_mem(blocks)
    b.check()


def test_corrupt_host_memory_is_forgotten_and_never_read(make) -> None:
    a = make("a")
    tokens = list(range(3 * C))
    blocks = a.alloc_mem(3)
    a.write(blocks, data(3))
    a.insert(tokens, blocks)
    a.free_mem(blocks)
    assert a.swap_out(3) == 3
    found = a.match([*tokens, 0])
    a.node.arena.slots_of([found.addresses[1].index])[0][0] += 1  # type: ignore[union-attr]
    with pytest.raises(CorruptBlock, match="kept with checksum"):
        a.swap_in(found.take())
    assert held(a) == 0 and a.match([*tokens, 0]).num_tokens < 3 * C
    a.check()


def test_wrong_calls_change_nothing(two) -> None:
    a, b = two
    blocks = a.alloc_mem(4)
    a.write(blocks, data(4))
    a.insert(list(range(2 * C)), blocks)
    [freed] = a.alloc_mem(1)
    a.free_mem([freed])
    foreign = BlockAddress("nobody", 1, Medium.HBM, 1, 0)
    dram = a.alloc_mem(1, Medium.DRAM)
    before = (repr(a), repr(b))
    for error, words, call in (
        (PoolFull, "99 blocks needed", lambda: a.alloc_mem(99)),
        (InvalidAddresses, "-1", lambda: a.alloc_mem(-1)),
        (StaleAddress, "was freed", lambda: a.free_mem([freed])),
        (StaleAddress, "2 times", lambda: a.free_mem([blocks[0], blocks[0]])),
        (UnknownInstance, "nobody", lambda: a.free_mem([foreign])),
        (StaleAddress, "was freed", lambda: a.insert(list(range(C)), [freed])),
        (InvalidAddresses, "fill 3 blocks", lambda: a.insert(list(range(3 * C)), blocks[:2])),
        (InvalidAddresses, "other tokens", lambda: a.insert([7] * C, blocks[:1])),
        (ForeignAddress, "DRAM", lambda: a.swap_in(blocks[:1])),
        (StaleAddress, "was freed", lambda: a.transfer("b", [freed])),
        (UnknownInstance, "'c'", lambda: a.transfer("c", blocks)),
        (UnknownInstance, "'a'", lambda: a.transfer("a", blocks)),
        (InvalidTransfer, "at least one", lambda: a.transfer("b", [])),
        (InvalidTransfer, "as many destinations, not 1", lambda: a.transfer("b", blocks, dram)),
        (InvalidTransfer, "is not at b", lambda: a.transfer("b", dram, dram)),
        (InvalidTransfer, "1,048,577", lambda: a.transfer("b", blocks, private=b"x" * (tx.MAX_PRIVATE + 1))),
        (InvalidTransfer, "ready=9", lambda: a.transfer("b", blocks, ready=9)),
        (InvalidTransfer, "more than the 4", lambda: a.transfer_with_insert("b", list(range(5 * C)), blocks)),
        (InvalidTokens, "int32", lambda: a.insert([2**31] * C, blocks[:1])),
        (InvalidTokens, "int32", lambda: a.match([0.5] * (C + 1))),
        (InvalidTokens, "int64 beyond", lambda: a.match(np.array([2**32 + 5] * (C + 1)))),
        (InvalidTokens, "float32", lambda: a.match(np.zeros(C + 1, np.float32))),
        (InvalidAddresses, "cannot hold", lambda: a.write(blocks, data(3))),
        (StaleAddress, "was freed", lambda: a.read([freed])),
        (UnknownInstance, "'c'", lambda: a.alloc_mem(1, instance="c")),
    ):
        with pytest.raises(error, match=words):
            call()
        assert (repr(a), repr(b)) == before, words
        a.check(), b.check()
    with pytest.raises(TransferError, match="not held by 'a'|was freed"):
        a.transfer("b", dram, [BlockAddress("b", b.node.blocks.epoch, Medium.HBM, 1, 0)]).result(5)
    a.free_mem([*blocks, *dram])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"layout": PageLayout(3, 2, 8, 8, "float32")}, "block_size=8.*block_size=4"),
        ({"layout": PageLayout(3, 2, 4, 8, "bfloat16")}, "dtype=bfloat16.*dtype=float32"),
        ({"model": "another"}, "model=another"),
    ],
)
def test_pools_that_differ_cannot_link(make, changes: dict, words: str) -> None:
    a, b = make("a"), make("b", **changes)
    with pytest.raises(TransferError, match=words):
        a.link(b)
    again = make("a")
    with pytest.raises(TransferError, match="our own name, a"):
        a.link(again)


def test_a_closed_pool_says_so(make) -> None:
    with pytest.raises(ConfigError, match="secret"):
        make("x", listen="127.0.0.1:0")
    a = make("a")
    with pytest.raises(Unavailable, match="listen"):
        a.connect("127.0.0.1:1")
    a.close()
    a.close()
    with pytest.raises(Unavailable, match="closed"):
        a.alloc_mem(1)


def test_many_threads_may_use_one_pool(two) -> None:
    a, b = two
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(15):
                tokens = [number * 1000 + turn * 100 + i for i in range(2 * C)]
                blocks = a.alloc_mem(2)
                a.write(blocks, data(2, number))
                a.insert(tokens, blocks)
                a.transfer_with_insert("b", tokens, blocks).result(10)
                assert (a.read(blocks) == data(2, number)).all()
                a.free_mem(blocks)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and held(a) == held(b) == 0
    a.check(), b.check()
