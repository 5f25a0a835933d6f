"""Quotas: what a cache salt may keep cached, per medium, whatever else happens."""

from collections import Counter
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from pool_world import DRAM, HBM, SALTS, C, World, random_calls

from jmemserve.errors import InvalidAddresses
from jmemserve.kvpool import BlockAddress, BlockPool


def cache(pool: BlockPool, start: int, num_blocks: int, salt: str, medium=HBM) -> list[BlockAddress]:
    addresses = pool.alloc_mem(num_blocks, medium)
    pool.insert(range(start, start + num_blocks * C), addresses, salt)
    pool.free_mem(addresses)
    return addresses


def found(pool: BlockPool, start: int, num_blocks: int, salt: str) -> int:
    return pool.peek(range(start, start + num_blocks * C + 1), salt) // C


def arrive(pool: BlockPool) -> None:
    for swap in pool.swaps.take():
        pool.swaps.done(swap)


def test_own_oldest_make_way_and_nobody_elses():
    pool = BlockPool("a", 1, 20, C, quota=(4, None))
    cache(pool, 0, 2, "other")  # the oldest of all
    cache(pool, 100, 2, "me")
    cache(pool, 200, 2, "me")
    with pool.match(range(100, 100 + 2 * C + 1), "me"):
        pass
    cache(pool, 300, 1, "me")
    assert (found(pool, 100, 2, "me"), found(pool, 200, 2, "me"), found(pool, 300, 1, "me")) == (2, 1, 1)
    cache(pool, 400, 3, "me")
    assert [found(pool, start, 3, "me") for start in (100, 200, 300, 400)] == [0, 0, 1, 3]
    assert found(pool, 0, 2, "other") == 2
    pool.check()


def test_a_prefix_longer_than_the_quota_is_cut_and_the_rest_stays_the_callers():
    pool = BlockPool("a", 1, 20, C, quota=(3, None))
    addresses = cache(pool, 0, 5, "me")
    assert found(pool, 0, 5, "me") == 3 and (pool.cached, pool.free) == (3, 17)
    with pool.match(range(5 * C + 1), "me") as match:
        assert match.addresses == tuple(addresses[:3])
        longer = [*match.addresses, *pool.alloc_mem(2)]
        assert pool.insert(range(5 * C), longer, "me") == []  # its start does not make way for its end
        assert found(pool, 0, 5, "me") == 3
        pool.free_mem(longer[3:])
    pool.check()


def test_held_blocks_make_no_way():
    pool = BlockPool("a", 1, 20, C, quota=(2, None))
    cache(pool, 0, 2, "me")
    with pool.match(range(2 * C + 1), "me"):
        cache(pool, 100, 2, "me")
        assert (found(pool, 0, 2, "me"), found(pool, 100, 2, "me")) == (2, 0)
    cache(pool, 100, 2, "me")
    assert (found(pool, 0, 2, "me"), found(pool, 100, 2, "me")) == (0, 2)


def test_a_quota_of_nothing_caches_nothing():
    pool = BlockPool("a", 1, 8, C, 8, quota=(0, 0))
    for medium in (HBM, DRAM):
        cache(pool, 0, 2, "me", medium)
    assert pool.stats().prefix_blocks == 0 and pool.free == 8 and pool.stats().dram.free == 8
    pool.check()


def test_what_is_swapped_out_beyond_the_quota_is_lost_not_kept():
    pool = BlockPool("a", 1, 4, C, 8, quota=(None, 1))
    cache(pool, 0, 3, "me")
    pool.alloc_mem(4)
    arrive(pool)
    pool.check()
    stats = pool.stats()
    assert stats.dram.cached <= 1 and stats.dram.held == 0
    assert stats.dram.cached + stats.dram.free == 8


def test_what_is_swapped_in_beyond_the_quota_stays_in_dram_only():
    pool = BlockPool("a", 1, 8, C, 8, quota=(1, None))
    cache(pool, 0, 3, "me", DRAM)
    fresh = pool.swap_in(pool.match(range(3 * C + 1), "me").take())
    arrive(pool)
    assert pool.peek_media(range(3 * C + 1), "me") == (1, 2) and pool.held == 3
    pool.free_mem(fresh)
    assert (pool.cached, pool.free, pool.stats().dram.cached) == (1, 7, 3)
    pool.check()


def test_a_wrong_insert_makes_nobody_make_way():
    pool = BlockPool("a", 1, 8, C, quota=(2, None))
    cache(pool, 0, 2, "me")
    mine = pool.alloc_mem(1)
    pool.insert(range(500, 500 + C), mine, "other")
    for tokens, addresses in ((range(100, 100 + C), mine), (range(100, 100 + 2 * C), [*pool.alloc_mem(1)] * 2)):
        with pytest.raises(InvalidAddresses):
            pool.insert(tokens, addresses, "me")
    assert found(pool, 0, 2, "me") == 2
    pool.check()


def check_counts(world: World) -> None:
    for salt in SALTS:
        for medium, limit in zip((HBM, DRAM), world.quota or (), strict=True):
            count = sum(blocks[medium] > 0 for key, blocks in world.copies.items() if key[0] == salt)
            assert limit is None or count <= limit, f"{salt!r}: {count} > {limit}"


def test_no_call_exceeds_the_quota():
    random, seen = Random(3), Counter[str]()
    for _ in range(15):
        limits = [random.choice((None, 0, 1, 2, 4, 6)) for _ in range(2)]
        world = World(random.randint(4, 16), random.randint(0, 16), quota=(limits[0], limits[1]))
        for _ in range(300):
            random_calls(world, random)()
            world.check()
            check_counts(world)
        world.finish()
        seen += world.seen
    assert seen["made way"] > 50 and seen["left out"] > 300 and seen["done out"] > 30 and seen["done in"] > 10, seen


limits = st.none() | st.integers(0, 6)


@settings(max_examples=40, deadline=None)
@given(
    random=st.randoms(use_true_random=False),
    quota=st.tuples(limits, limits),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_no_call_exceeds_any_quota(random, quota, sizes):
    world = World(sizes[0], sizes[1], quota)
    for _ in range(40):
        random_calls(world, random)()
        world.check()
        check_counts(world)
    world.finish()
