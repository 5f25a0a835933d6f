"""Bugs that others had and that must be impossible here, on whole pools with memory; those of the pure parts are
named in the tests of these parts (lessons 1 to 4, 6, 8 to 10, 12 to 14, 17, 18, 25, 27)."""

import dataclasses
import random
import re
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import jmemserve
from jmemserve.errors import InvalidTransfer, PoolFull, TransferError
from jmemserve.kernels.pages import PageLayout
from jmemserve.kvpool import Flags, Granularity, Medium
from jmemserve.kvpool import transfer as tx
from jmemserve.kvpool.events import EventLog, Removed, Stored
from jmemserve.kvpool.pool import MESSAGES, MemPool
from jmemserve.kvpool.transports.local import LocalExchange

LAYOUT = PageLayout(2, 4, 4, 8, "float32")
C = LAYOUT.block_size


@pytest.fixture
def make(request: pytest.FixtureRequest):
    exchange = LocalExchange()

    def pool(name: str, layout: PageLayout = LAYOUT, num_blocks: int = 32, dram: int = 32, devices=(0,), **kwargs):
        mesh = Mesh(np.array([jax.devices()[i] for i in devices]), ("model",))
        made = MemPool(name, layout, num_blocks, dram, mesh, exchange=exchange, **kwargs)
        request.addfinalizer(made.close)
        return made

    return pool


def contents(numbers: list[int], layout: PageLayout = LAYOUT) -> np.ndarray:
    """Blocks that say who they are in every kv head: [n, L, 2, K, C, H]."""
    heads = np.arange(layout.num_kv_heads).reshape(1, 1, 1, -1, 1, 1)
    own = np.array(numbers).reshape(-1, 1, 1, 1, 1, 1) * 8 + heads
    return np.broadcast_to(own % 251, (len(numbers), *layout.page_shape)).astype(layout.dtype)


def tokens_of(numbers: list[int]) -> list[int]:
    return [number * C + i for number in numbers for i in range(C)]


def quiet(*pools: MemPool) -> None:
    """Nothing is held, soon."""
    limit = time.monotonic() + 5
    while time.monotonic() < limit:
        stats = [pool.stats() for pool in pools]
        if all(s.hbm.held == s.dram.held == 0 and n.transfers_in == n.transfers_out == 0 for s, n in stats):
            break
        time.sleep(0.01)
    for pool in pools:
        pool.check()
        memory, _ = pool.stats()
        assert (memory.hbm.held, memory.dram.held) == (0, 0), pool


def test_lesson_5_news_of_a_transfer_counts_only_from_its_peer_and_by_its_id(make) -> None:
    a, b, c = make("a"), make("b"), make("c")
    a.link(b), a.link(c)
    blocks = a.alloc_mem(2)
    moving = a.transfer("b", blocks, private=None)  # stays open
    a._call(lambda: a.node.handle("c", tx.Done(moving.transfer_id)))
    a._call(lambda: a.node.handle("c", tx.Refuse(moving.transfer_id, "not mine to say")))
    a._call(lambda: a.node.handle("b", tx.Done("a.1.99")))
    assert not moving.done() and a.stats()[1].dropped == 3
    a.close_transfer(moving, b"")
    a.free_mem([*blocks, *moving.result(5)])
    quiet(a, b, c)


def test_lesson_7_nothing_is_wiped_after_it_came(make) -> None:
    a, b = make("a", num_blocks=8), make("b", num_blocks=8)
    a.link(b)
    blocks = a.alloc_mem(3)
    a.write(blocks, contents([1, 2, 3]))
    others = b.alloc_mem(5)
    there = a.transfer("b", blocks).result(5)
    b.free_mem(others)
    others = b.alloc_mem(5)
    b.write(others, contents([9] * 5))
    b.free_mem(others)
    np.testing.assert_array_equal(b.read(there), contents([1, 2, 3]))
    a.free_mem([*blocks, *there])
    quiet(a, b)


@pytest.mark.parametrize("ours, theirs", [(1, 2), (2, 1), (2, 4), (4, 2), (4, 4)])
@pytest.mark.parametrize("granularity", [Granularity.BY_LAYER, Granularity.BY_REQUEST, Granularity.BY_REQUEST_AGG])
def test_lessons_11_and_23_every_head_arrives_at_its_place_whatever_the_meshes(make, ours, theirs, granularity) -> None:
    """One ledger decides for all devices of a mesh; blocks say in every head whose they are."""
    a, b = make("a", devices=range(ours)), make("b", devices=range(4, 4 + theirs))
    a.link(b)
    numbers = list(range(7))
    blocks = a.alloc_mem(7)
    a.write(blocks, contents(numbers))
    for flags in (Flags.NONE, Flags.DRAM):
        there = a.transfer("b", blocks, flags=flags, granularity=granularity).result(20)
        np.testing.assert_array_equal(b.read(there), contents(numbers))
        a.free_mem(there)
    a.free_mem(blocks)
    quiet(a, b)


def test_lesson_15_events_can_be_applied_twice(make) -> None:
    a = make("a")
    blocks = a.alloc_mem(4)
    a.insert(tokens_of([1, 2, 3, 4]), blocks)
    a.free_mem(blocks)
    a.swap_out(2)
    a.delete(tokens_of([1, 2]))
    log = a.node.blocks.log
    assert log is not None
    events = log.since(0)
    assert events is not None and [event.number for event in events] == list(range(1, log.last + 1))

    def apply(times: int) -> set[tuple[int, int]]:
        mirror: set[tuple[int, int]] = set()
        for event in events:
            for _ in range(times):
                ids = {(event.medium, block) for block in event.ids}
                mirror = mirror | ids if isinstance(event, Stored) else mirror - ids
        return mirror

    snapshot = a._call(a.node.blocks.snapshot)
    assert apply(1) == apply(2) == {(record.medium, block) for record in snapshot.stored for block in record.ids}
    assert snapshot.number == log.last
    quiet(a)


def test_lesson_16_lost_events_are_noticed() -> None:
    log = EventLog(capacity=4)
    for number in range(10):
        log.removed(Medium.HBM, [number])
    assert log.since(5) is None and log.since(11) is None
    later = log.since(6)
    assert later is not None and [event.number for event in later] == [7, 8, 9, 10]
    assert log.since(10) == [] and isinstance(later[0], Removed)


def test_lesson_19_blocks_of_more_than_four_mebibytes(make) -> None:
    layout = PageLayout(4, 8, 64, 256, "float32")  # 4 MiB each
    a, b = make("a", layout, 4, 4), make("b", layout, 4, 4)
    a.link(b)
    data = np.random.default_rng(0).normal(size=(2, *layout.page_shape)).astype(np.float32)
    assert data[0].nbytes >= 4 << 20
    blocks = a.alloc_mem(2)
    a.write(blocks, data)
    for flags in (Flags.NONE, Flags.DRAM):
        there = a.transfer("b", blocks, flags=flags).result(20)
        np.testing.assert_array_equal(b.read(there), data)
        a.free_mem(there)
    a.free_mem(blocks)
    quiet(a, b)


def test_lesson_20_a_former_life_is_fenced_off(make) -> None:
    a, b = make("a"), make("b")
    a.link(b)
    hello = a.node.peers.hello()
    again = dataclasses.replace(hello, epoch=hello.epoch + 1)
    mine = a.alloc_mem(2, instance="b")
    assert b.stats()[0].hbm.held == 2
    b._call(lambda: b.node.greet(again))  # a has started anew: what it had is free
    assert b.stats()[0].hbm.held == 0
    with pytest.raises(TransferError, match="former life"):
        b._call(lambda: b.node.greet(hello))
    for late in (
        tx.Allocate("late", "a", hello.epoch, 3, Medium.HBM),
        tx.Free("a", hello.epoch, tuple(mine)),
        tx.Renew("a", hello.epoch, ()),
    ):
        b._call(lambda late=late: b.node.handle("a", late))
    assert b.stats()[1].dropped == 3 and b.stats()[0].hbm.held == 0
    quiet(b)


def test_lesson_21_what_strangers_send_is_bounded_and_never_code(make) -> None:
    for path in Path(jmemserve.__file__).parent.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|marshal|shelve|dill)", text, re.MULTILINE), path
    a, b = make("a"), make("b")
    a.link(b)
    blocks = a.alloc_mem(1)
    with pytest.raises(InvalidTransfer, match=r"1,048,577 bytes; at most 1,048,576"):
        a.transfer("b", blocks, private=b"x" * (tx.MAX_PRIVATE + 1))
    epoch = a.node.blocks.epoch
    offer = tx.Offer("a.1.x", "a", epoch, None, False, 2, "", "", Flags.NONE, 1, ())
    whole = MESSAGES.encode(offer)
    rng = random.Random(0)
    wrong = [rng.randbytes(rng.randrange(60)) for _ in range(200)] + [whole[:cut] for cut in range(len(whole))]
    wrong += [MESSAGES.encode(dataclasses.replace(offer, num_blocks=n, transfer_id=f"{n}")) for n in (10**9, -1)]
    wrong += [MESSAGES.encode(dataclasses.replace(offer, parts=n, transfer_id=f"p{n}")) for n in (0, -5)]
    wrong.append(MESSAGES.encode(tx.Allocate("c", "a", epoch, 10**12, Medium.HBM)))
    wrong.append(MESSAGES.encode(tx.Allocate("c", "a", epoch, -1, Medium.MIXED)))
    for raw in wrong:
        b._take("a", raw)
    np.testing.assert_array_equal(b.read(a.transfer("b", blocks).result(5)).shape, (1, *LAYOUT.page_shape))
    assert b.stats()[1].dropped >= 200 and b.stats()[0].hbm.held == 1
    a.free_mem(blocks)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_lesson_29_8192_tokens_to_host_memory_and_back(make, dtype: str) -> None:
    layout = PageLayout(2, 2, 16, 8, dtype)
    a, b = make("a", layout, 520, 520), make("b", layout, 520, 520)
    a.link(b)
    tokens = list(range(8192))
    data = np.random.default_rng(0).normal(size=(512, *layout.page_shape)).astype(np.dtype(jax.numpy.dtype(dtype)))
    blocks = a.alloc_mem(512)
    a.write(blocks, data)
    a.insert(tokens, blocks)
    a.free_mem(blocks)
    swapped = 0
    while swapped < 512:
        assert (count := a.swap_out(512)) > 0
        swapped += count
    found = a.match([*tokens, 0])
    assert {block.medium for block in found.addresses} == {Medium.DRAM} and found.num_tokens == 8192
    np.testing.assert_array_equal(a.read(found.addresses).view(np.uint8), data.view(np.uint8))
    there = a.transfer("b", found.addresses).result(20)  # DRAM to HBM
    np.testing.assert_array_equal(b.read(there).view(np.uint8), data.view(np.uint8))
    a.free_mem(there)
    back = a.swap_in(found.take())
    np.testing.assert_array_equal(a.read(back).view(np.uint8), data.view(np.uint8))
    a.free_mem(back)
    quiet(a, b)


def soak(a: MemPool, b: MemPool, rounds: int, seed: int) -> None:
    """Random work on two small pools; every block that is found says whose it is."""
    rng = random.Random(seed)
    conversations = [[rng.randrange(1000) for _ in range(rng.randrange(2, 9))] for _ in range(12)]
    for _ in range(rounds):
        pool, other = (a, b) if rng.random() < 0.5 else (b, a)
        numbers = rng.choice(conversations)
        tokens = tokens_of(numbers)
        what = rng.choice(["serve", "serve", "serve", "move", "move", "swap", "delete"])
        if what == "swap":
            pool.swap_out(rng.randrange(8))
        elif what == "delete" and rng.random() < 0.3:
            pool.delete(tokens[: C * rng.randrange(1, len(numbers) + 1)])
        else:
            found = pool.match([*tokens, 0])
            have = list(found.addresses)
            np.testing.assert_array_equal(pool.read(have), contents(numbers[: len(have)]))
            blocks = found.take()
            try:
                in_dram = [block for block in blocks if block.medium is Medium.DRAM]
                fresh = iter(pool.swap_in(in_dram))
                blocks = [next(fresh) if block.medium is Medium.DRAM else block for block in blocks]
                new = pool.alloc_mem(len(numbers) - len(blocks))
            except PoolFull:
                pool.free_mem(blocks)
                continue
            pool.write(new, contents(numbers[len(blocks) :]))
            blocks += new
            pool.insert(tokens, blocks)
            if what == "move":
                flags = rng.choice([Flags.NONE, Flags.DRAM, Flags.MIXED])
                granularity = rng.choice(list(Granularity))
                moving = pool.transfer_with_insert(other.instance, tokens, blocks, flags=flags, granularity=granularity)
                try:
                    moving.result(20)
                except TransferError as error:
                    assert "blocks needed" in str(error), error
            np.testing.assert_array_equal(pool.read(blocks), contents(numbers))
            pool.free_mem(blocks)
    quiet(a, b)
    for pool in (a, b):
        memory, moved = pool.stats()
        assert memory.swapped_in > 0 and moved.bytes_in > 0 and moved.corrupt == 0, (memory, moved)


def test_lesson_24_no_slow_drift(make) -> None:
    a, b = make("a", num_blocks=14, dram=20), make("b", num_blocks=14, dram=20, devices=(2, 3))
    a.link(b)
    soak(a, b, 250, 0)


@pytest.mark.slow
def test_lesson_24_no_slow_drift_for_long(make) -> None:
    a, b = make("a", num_blocks=14, dram=20), make("b", num_blocks=14, dram=20, devices=(2, 3))
    a.link(b)
    soak(a, b, 10_000, 1)
