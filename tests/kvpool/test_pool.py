"""BlockPool: what each verb promises, and the field's lessons that apply to it."""

import subprocess
import sys

import numpy as np
import pytest

from jmemserve.errors import ForeignAddress, PoolFull, StaleAddress
from jmemserve.kvpool import BlockAddress, BlockPool, Medium

C = 4  # tokens per block


def make(num_blocks: int = 8) -> BlockPool:
    return BlockPool("prefill0", 7, num_blocks, C)


def cache(pool: BlockPool, tokens: list[int], salt: str = "") -> list[BlockAddress]:
    """Compute, index and let go of whole blocks."""
    addresses = pool.alloc_mem(len(tokens) // C)
    pool.insert(tokens, addresses, salt)
    pool.free_mem(addresses)
    return addresses


def test_alloc_gives_usable_blocks_and_never_page_zero():
    pool = make()
    addresses = pool.alloc_mem(8)
    assert sorted(address.index for address in addresses) == list(range(1, 9))
    assert addresses[0] == BlockAddress("prefill0", 7, Medium.HBM, addresses[0].index, 0)
    assert pool.room() == 0
    pool.check()


def test_alloc_is_all_or_nothing():
    pool = make()
    cache(pool, list(range(2 * C)))
    pool.alloc_mem(3)
    with pytest.raises(PoolFull) as info:
        pool.alloc_mem(6)
    assert (info.value.needed, info.value.free, info.value.cached) == (6, 3, 2)
    assert repr(pool) == "<BlockPool prefill0: HBM 62% of 8 (3 held, 2 cached, 3 free); no look-ups yet>"
    assert len(pool.alloc_mem(5)) == 5
    assert pool.stats().evictions == 2
    assert pool.alloc_mem(0) == []
    pool.check()


def test_only_hbm_has_room():
    pool = make()
    assert pool.room(Medium.DRAM) == 0
    with pytest.raises(PoolFull):
        pool.alloc_mem(1, Medium.DRAM)


def test_match_holds_whole_blocks_and_never_the_last_token():
    pool = make()
    tokens = list(range(2 * C))
    cached = cache(pool, tokens)
    assert pool.peek(tokens) == C and pool.peek([*tokens, 99]) == 2 * C
    with pool.match(tokens) as match:
        assert match.num_tokens == C and match.addresses == tuple(cached[:1])
        assert pool.held == 1
    match.release()
    assert pool.held == 0 and match.addresses == ()
    taken = pool.match([*tokens, 99]).take()
    assert taken == cached and pool.held == 2
    pool.free_mem(taken)
    stats = pool.stats()
    assert (stats.hit_tokens, stats.query_tokens) == (3 * C, 4 * C + 1)
    assert pool.match([]).num_tokens == 0
    pool.check()


def test_numpy_and_sequences_are_the_same_tokens():
    pool = make()
    cache(pool, list(range(2 * C)))
    assert pool.peek(np.arange(2 * C + 1)) == pool.peek(tuple(range(2 * C + 1))) == 2 * C


def test_insert_returns_duplicates_and_changes_no_references():
    pool = make()
    tokens = list(range(3 * C))
    first = pool.alloc_mem(3)
    assert pool.insert(tokens[: 2 * C], first) == []
    second = pool.alloc_mem(3)
    assert pool.insert(tokens, second) == second[:2]
    assert pool.insert(tokens, second) == second[:2]
    assert pool.insert(tokens[: 2 * C], first) == []
    pool.free_mem(second)  # the duplicates become free, the last one stays cached below the other's blocks
    assert (pool.free, pool.held, pool.cached) == (4, 3, 1)
    match = pool.match([*tokens, 0])
    assert match.addresses == (first[0], first[1], second[2])
    match.release()
    pool.free_mem(first)
    pool.check()


def test_a_part_filled_block_is_not_indexed():
    pool = make()
    addresses = pool.alloc_mem(2)
    assert pool.insert(list(range(C + 1)), addresses) == []
    pool.free_mem(addresses)
    assert (pool.free, pool.cached) == (7, 1)


def test_the_oldest_leaf_is_evicted_first_and_tails_before_heads():
    pool = make(6)
    old, new = [*range(3 * C)], [*range(100, 100 + 3 * C)]
    cache(pool, old)
    cache(pool, new)
    pool.match([*old, 0]).release()  # now the newer of the two
    held = pool.alloc_mem(2)
    assert (pool.peek([*old, 0]), pool.peek([*new, 0])) == (3 * C, C)
    held += pool.alloc_mem(2)
    assert (pool.peek([*old, 0]), pool.peek([*new, 0])) == (2 * C, 0)
    pool.free_mem(held)
    pool.check()


def test_peek_does_not_keep_a_prefix_alive():
    pool = make(2)
    cache(pool, [*range(C)])
    cache(pool, [*range(100, 100 + C)])
    pool.peek([*range(C), 0])
    pool.alloc_mem(1)
    assert pool.peek([*range(C), 0]) == 0


def test_an_unheld_block_above_a_held_one_is_room_too():
    pool = make(3)
    tokens = [*range(2 * C)]
    first = pool.alloc_mem(1)
    pool.insert(tokens[:C], first)
    second = pool.alloc_mem(2)
    assert pool.insert(tokens, second) == second[:1]
    pool.free_mem(first)
    pool.free_mem(second[:1])
    assert (pool.free, pool.held, pool.cached) == (1, 1, 1)
    assert len(pool.alloc_mem(2)) == 2
    pool.check()
    pool.free_mem(second[1:])  # left the index with its parent
    assert (pool.free, pool.cached) == (1, 0)
    pool.check()


def test_delete_forgets_a_prefix_and_what_continues_it():
    pool = make()
    stem = [*range(2 * C)]
    cache(pool, stem)
    for end in (50, 60):
        tokens = [*stem, *range(end, end + C)]
        with pool.match(tokens) as match:
            addresses = match.take() + pool.alloc_mem(1)
        pool.insert(tokens, addresses)
        pool.free_mem(addresses)
    assert pool.delete([*stem, 1, 2, 3, 4]) == 0  # not known
    assert pool.delete(stem[:3]) == 0  # no whole block
    assert pool.delete([*stem, *range(60, 60 + C)]) == 1
    held = pool.match([*stem, *range(50, 50 + C), 0])
    assert pool.delete(stem) == 2  # its last block and what continued it; the shorter prefix stays
    assert pool.peek([*stem, 0]) == C and pool.held == 3
    pool.check()
    held.release()
    assert (pool.free, pool.cached) == (7, 1)


def test_clear_forgets_everything_but_held_blocks_survive():
    pool = make()
    cache(pool, [*range(2 * C)])
    cache(pool, [*range(2 * C)], salt="x")
    match = pool.match([*range(2 * C)])
    assert pool.clear() == 4
    assert (pool.free, pool.held, pool.cached) == (7, 1, 0)
    pool.check()
    match.release()
    assert pool.free == 8
    pool.check()


def test_salts_do_not_share():
    pool = make()
    cache(pool, [*range(C)], salt="a")
    assert pool.peek([*range(C), 0], "a") == C
    assert pool.peek([*range(C), 0], "b") == pool.peek([*range(C), 0]) == 0


def test_foreign_addresses_change_nothing():
    pool, other = make(), BlockPool("decode0", 7, 8, C)
    mine = pool.alloc_mem(2)
    for bad in (
        other.alloc_mem(1)[0],
        mine[0]._replace(medium=Medium.DRAM),
        mine[0]._replace(index=0),
        mine[0]._replace(index=9),
    ):
        for call in (pool.free_mem, lambda addresses: pool.insert([*range(2 * C)], addresses)):
            with pytest.raises(ForeignAddress):
                call([mine[0], bad])
    assert pool.held == 2 and pool.peek([*range(2 * C)]) == 0
    pool.check()


# -- the field's lessons -----------------------------------------------------------------------------------------------


def test_lesson_1_an_old_address_never_names_a_reused_block():
    pool = make(1)
    [old] = pool.alloc_mem(1)
    pool.free_mem([old])
    [new] = pool.alloc_mem(1)
    assert new.index == old.index and new.generation == old.generation + 1
    for call in (lambda: pool.free_mem([old]), lambda: pool.insert([*range(C)], [old])):
        with pytest.raises(StaleAddress):
            call()
    assert pool.held == 1
    pool.check()


def test_lesson_9_a_branch_in_a_held_prefix_moves_no_pin():
    pool = make()
    tokens = [*range(3 * C)]
    cache(pool, tokens)
    lease = pool.match([*tokens, 0])
    branch = [*tokens[:C], *range(70, 70 + 2 * C)]
    cache(pool, branch)
    pool.alloc_mem(5)  # takes the branch, never the pinned prefix
    with pytest.raises(PoolFull):
        pool.alloc_mem(1)
    assert pool.peek([*tokens, 0]) == 3 * C
    assert all(pool.address(address.index) == address for address in lease.addresses)
    lease.release()
    pool.check()


def test_lesson_13_a_double_free_changes_nothing_and_a_lease_ends_once():
    pool = make()
    kept, *freed = pool.alloc_mem(3)
    pool.free_mem(freed)
    for bad in ([kept, *freed], [kept, kept]):
        with pytest.raises(StaleAddress):
            pool.free_mem(bad)
    assert (pool.free, pool.held) == (7, 1)
    pool.free_mem([kept])
    cache(pool, [*range(C)])
    first, second = pool.match([*range(C), 0]), pool.match([*range(C), 0])
    first.release()
    first.release()
    assert pool.held == 1
    [address] = second.take()
    second.release()
    assert pool.held == 1
    pool.free_mem([address])
    with pytest.raises(StaleAddress):
        pool.free_mem([address])
    assert pool.held == 0
    pool.check()


def test_lesson_14_an_address_of_a_former_life_is_stale():
    old = BlockPool("prefill0", 6, 8, C).alloc_mem(1)
    pool = make()
    pool.alloc_mem(8)
    with pytest.raises(StaleAddress):
        pool.free_mem(old)


def test_lesson_18_what_a_dead_owner_held_comes_back_once():
    pool = make()
    tokens = [*range(2 * C)]
    theirs = pool.alloc_mem(3, owner="decode1")
    pool.insert(tokens, theirs)
    match = pool.match([*tokens, 0])
    with pytest.raises(StaleAddress):
        pool.free_mem(theirs[2:])  # not the caller's
    with pytest.raises(StaleAddress):
        pool.free_mem(theirs[2:], owner="decode2")
    pool.free_mem(theirs[1:2], owner="decode1")
    assert pool.held == 3  # the match holds it still
    pool.check()
    assert pool.free_owned_by("decode1") == 2
    assert pool.free_owned_by("decode1") == 0
    assert (pool.held, pool.free) == (2, 6)
    pool.check()
    match.release()
    given = pool.alloc_mem(1)
    pool.give(given, "decode1")
    with pytest.raises(StaleAddress):
        pool.free_mem(given)  # not the caller's any more
    assert pool.free_owned_by("decode1") == 1
    assert pool.held == 0
    pool.check()


def test_lesson_25_matching_goes_by_tokens():
    """Turn 2 is turn 1 without its reasoning: only what is really equal is reused."""
    pool = make()
    turn_1 = [*range(2 * C), 90, 91, 92, 93, 20, 21, 22, 23]
    cache(pool, turn_1)
    turn_2 = [*range(2 * C), 20, 21, 22, 23, 30, 31, 32, 33]
    with pool.match(turn_2) as match:
        assert match.num_tokens == 2 * C


def test_lesson_27_hits_do_not_depend_on_the_hash_seed():
    program = (
        "from jmemserve.kvpool import BlockPool\n"
        "pool = BlockPool('a', 0, 64, 4)\n"
        "for start in range(0, 64, 8):\n"
        "    blocks = pool.alloc_mem(12)\n"
        "    pool.insert([*range(start, start + 48)], blocks, 'salt')\n"
        "    pool.free_mem(blocks)\n"
        "print([pool.peek([*range(start, start + 50)], 'salt') for start in range(0, 64, 8)], pool)\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "12345")
    }
    assert len(answers) == 1 and "48" in answers.pop()
