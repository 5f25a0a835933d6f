"""BlockPool with two media: what each verb promises, one by one."""

import pytest

from jmemserve.errors import ForeignAddress, InvalidAddresses, PoolFull, StaleAddress
from jmemserve.kvpool import BlockAddress, BlockPool, Medium
from jmemserve.kvpool.swaps import MAX_ON_THE_WAY, Swap

C = 4  # tokens per block
HBM, DRAM, MIXED = Medium.HBM, Medium.DRAM, Medium.MIXED


def make(num_hbm: int = 4, num_dram: int = 8) -> BlockPool:
    return BlockPool("prefill0", 7, num_hbm, C, num_dram)


def tokens_of(prefix: int, num_blocks: int) -> list[int]:
    return [1000 * prefix + i for i in range(num_blocks * C)]


def cache(pool: BlockPool, prefix: int, num_blocks: int, medium: Medium = HBM) -> list[BlockAddress]:
    """Compute, index and let go of whole blocks."""
    addresses = pool.alloc_mem(num_blocks, medium)
    assert pool.insert(tokens_of(prefix, num_blocks), addresses) == []
    pool.free_mem(addresses)
    return addresses


def media(pool: BlockPool, prefix: int, num_blocks: int) -> tuple[int, int]:
    """How many blocks of a prefix are found in HBM and only in DRAM."""
    return pool.peek_media([*tokens_of(prefix, num_blocks), 0])


def hold(pool: BlockPool, prefix: int, num_blocks: int) -> list[BlockAddress]:
    return pool.match([*tokens_of(prefix, num_blocks), 0]).take()


def carry_out(pool: BlockPool, well: bool = True) -> list[Swap]:
    """Take every order and end it."""
    orders = pool.swaps.take()
    for swap in orders:
        (pool.swaps.done if well else pool.swaps.failed)(swap)
    pool.check()
    return orders


def counts(pool: BlockPool) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Free, held and cached blocks of either medium."""
    stats = pool.stats()
    hbm, dram = stats.hbm, stats.dram
    return (hbm.free, hbm.held, hbm.cached), (dram.free, dram.held, dram.cached)


# -- allocation --------------------------------------------------------------------------------------------------------


def test_each_medium_has_its_own_blocks():
    pool = make()
    in_hbm, in_dram = pool.alloc_mem(4), pool.alloc_mem(8, DRAM)
    assert {address.medium for address in in_hbm} == {HBM} and {address.medium for address in in_dram} == {DRAM}
    assert sorted(address.index for address in in_dram) == list(range(1, 9)), "number 0 is nobody's"
    for medium in (HBM, DRAM, MIXED):
        with pytest.raises(PoolFull):
            pool.alloc_mem(1, medium)
    pool.free_mem([*in_dram, *in_hbm])
    assert counts(pool) == ((4, 0, 0), (8, 0, 0))
    pool.check()


def test_mixed_takes_hbm_first():
    pool = make()
    assert [address.medium for address in pool.alloc_mem(6, MIXED)] == [HBM] * 4 + [DRAM] * 2
    assert [address.medium for address in pool.alloc_mem(6, MIXED)] == [DRAM] * 6
    assert pool.room(MIXED) == 0


def test_mixed_is_all_or_nothing_when_both_media_are_full_of_cache():
    pool = make(2, 2)
    cache(pool, 1, 2)
    cache(pool, 2, 2, DRAM)
    with pytest.raises(PoolFull):
        pool.alloc_mem(5, MIXED)
    assert counts(pool) == ((0, 0, 2), (0, 0, 2))
    assert len(pool.alloc_mem(4, MIXED)) == 4
    assert counts(pool) == ((0, 2, 0), (0, 2, 0))
    pool.check()


def test_a_negative_number_of_blocks_is_refused():
    pool = make()
    for medium in (HBM, DRAM, MIXED):
        with pytest.raises(InvalidAddresses):
            pool.alloc_mem(-1, medium)
        assert pool.alloc_mem(0, medium) == []


# -- out of HBM --------------------------------------------------------------------------------------------------------


def test_swap_out_takes_the_least_recently_used_and_loses_nothing():
    pool = make(6)
    for prefix in (1, 2, 3):
        cache(pool, prefix, 2)
    hold(pool, 1, 2)  # used last, and held
    assert pool.swap_out(2) == 2
    assert counts(pool) == ((2, 2, 2), (6, 2, 0)) and media(pool, 2, 2) == (0, 0)
    [order] = carry_out(pool)
    assert order.out and len(order.hbm) == 2
    assert [media(pool, prefix, 2) for prefix in (1, 2, 3)] == [(2, 0), (0, 2), (2, 0)]
    assert pool.swap_out(5) == 2, "what is held stays"
    carry_out(pool)
    assert [media(pool, prefix, 2) for prefix in (1, 2, 3)] == [(2, 0), (0, 2), (0, 2)]
    assert pool.stats().swapped_out == 4 and pool.stats().evictions == 0


def test_swap_out_takes_the_end_of_a_prefix_first():
    pool = make()
    cache(pool, 1, 4)
    pool.swap_out(1)
    carry_out(pool)
    assert media(pool, 1, 4) == (3, 1)
    assert [address.medium for address in hold(pool, 1, 4)] == [HBM, HBM, HBM, DRAM]


def test_what_is_on_its_way_cannot_be_found():
    pool = make()
    cache(pool, 1, 4)
    pool.swap_out(2)
    [order] = pool.swaps.take()
    assert media(pool, 1, 4) == (2, 0) and pool.match(tokens_of(1, 4)).num_tokens == 2 * C
    pool.swaps.done(order)
    assert media(pool, 1, 4) == (2, 2)


def test_pressure_spills_instead_of_losing():
    pool = make(4, 8)
    old = cache(pool, 1, 4)
    fresh = pool.alloc_mem(3)
    assert {address.index for address in fresh} < {address.index for address in old}
    assert all(address.generation == 1 for address in fresh)
    orders = pool.swaps.take()  # before anything is written to the fresh blocks
    assert [set(order.hbm) for order in orders] == [{address.index for address in fresh}]
    for order in orders:
        pool.swaps.done(order)
    assert media(pool, 1, 4) == (1, 3)
    assert pool.stats().evictions == 0 and pool.swaps.take() == []
    pool.check()


def test_reads_are_ordered_before_writes_to_the_same_block():
    """What is swapped in may land in the very blocks that are swapped out for it."""
    pool = make(2, 4)
    cache(pool, 1, 2, DRAM)
    cache(pool, 2, 2)
    there = hold(pool, 1, 2)
    fresh = pool.swap_in(there)
    out, back = pool.swaps.take()
    assert out.out and not back.out and set(out.hbm) == set(back.hbm) == {address.index for address in fresh}
    pool.swaps.done(out)
    pool.swaps.done(back)
    assert media(pool, 1, 2) == (2, 0) and media(pool, 2, 2) == (0, 2)
    pool.check()


def test_a_full_dram_drops_its_oldest():
    pool = make(2, 2)
    cache(pool, 1, 2)
    cache(pool, 2, 2)
    carry_out(pool)
    assert [media(pool, prefix, 2) for prefix in (1, 2)] == [(0, 2), (2, 0)]
    cache(pool, 3, 2)
    carry_out(pool)
    assert [media(pool, prefix, 2) for prefix in (1, 2, 3)] == [(0, 0), (0, 2), (2, 0)]
    assert pool.stats().evictions == 2 and pool.stats().prefix_blocks == 4


def test_a_dram_full_of_held_blocks_takes_nothing():
    pool = make(2, 2)
    pool.alloc_mem(2, DRAM)
    cache(pool, 1, 2)
    assert pool.swap_out(2) == 0 and pool.write_back(2) == 0 and media(pool, 1, 2) == (2, 0)
    pool.check()
    pool.alloc_mem(1)
    assert pool.swaps.take() == [] and media(pool, 1, 2) == (1, 0) and pool.stats().evictions == 1
    pool.check()


def test_what_could_not_be_swapped_out_can_be_later():
    pool = make(2, 2)
    blocker = pool.alloc_mem(2, DRAM)
    cache(pool, 1, 2)
    assert pool.swap_out(2) == 0
    pool.free_mem(blocker)
    assert pool.swap_out(2) == 2
    carry_out(pool)
    assert media(pool, 1, 2) == (0, 2)


def test_nothing_goes_to_dram_by_itself_while_computing_is_cheaper():
    pool = make()
    pool.swaps.enabled = False
    cache(pool, 1, 4)
    assert pool.swap_out(4) == 0 and pool.write_back(4) == 0
    pool.alloc_mem(2)
    assert pool.swaps.take() == [] and media(pool, 1, 4) == (2, 0)
    pool.check()
    pool.swaps.enabled = True
    assert pool.swap_out(4) == 2
    carry_out(pool)
    assert media(pool, 1, 4) == (0, 2)


def test_only_so_much_is_on_the_way_at_once():
    pool = make(2 * MAX_ON_THE_WAY, 2 * MAX_ON_THE_WAY)
    cache(pool, 1, 2 * MAX_ON_THE_WAY)
    assert pool.swap_out(2 * MAX_ON_THE_WAY) == MAX_ON_THE_WAY
    assert pool.swap_out(1) == 0
    carry_out(pool)
    assert pool.swap_out(2 * MAX_ON_THE_WAY) == MAX_ON_THE_WAY


# -- copies in both ----------------------------------------------------------------------------------------------------


def test_write_back_keeps_the_copy_in_hbm_and_makes_a_later_drop_free():
    pool = make(4, 4)
    cache(pool, 1, 4)
    assert pool.write_back(3) == 3
    assert media(pool, 1, 4) == (4, 0) and counts(pool) == ((0, 0, 4), (1, 3, 0)) and pool.reclaimable == 0
    carry_out(pool)
    assert media(pool, 1, 4) == (4, 0) and counts(pool) == ((0, 0, 4), (1, 0, 3)) and pool.reclaimable == 3
    assert pool.write_back(9) == 1, "what has a copy needs no other"
    carry_out(pool)
    pool.alloc_mem(3)
    assert pool.swaps.take() == [] and media(pool, 1, 4) == (1, 3)
    assert counts(pool) == ((0, 3, 1), (0, 0, 4)), "the copies in a full DRAM are what makes the drop free"
    pool.check()


def test_a_block_may_be_given_away_while_it_is_written_back():
    pool = make()
    cache(pool, 1, 4)
    pool.write_back(4)
    pool.alloc_mem(4)
    assert media(pool, 1, 4) == (0, 0)
    [order] = carry_out(pool)
    assert len(order.hbm) == 4 and media(pool, 1, 4) == (0, 4)


def test_being_copied_is_no_use():
    pool = make(4, 8)
    cache(pool, 1, 2)
    cache(pool, 2, 2)
    assert pool.write_back(2) == 2
    carry_out(pool)
    assert media(pool, 1, 2) == (2, 0)
    pool.alloc_mem(2)
    carry_out(pool)
    assert (media(pool, 1, 2), media(pool, 2, 2)) == ((0, 2), (2, 0)), "the oldest, which has a copy, goes first"


def test_write_back_begins_again_when_there_is_room_again():
    pool = make(4, 2)
    cache(pool, 1, 4)
    assert pool.write_back(4) == 2
    carry_out(pool)
    assert pool.write_back(4) == 0, "no copy makes way for another"
    blocks = pool.alloc_mem(2, DRAM)
    pool.free_mem(blocks)
    assert pool.write_back(1) == 1
    carry_out(pool, well=False)
    assert pool.write_back(4) == 2
    carry_out(pool)
    assert pool.reclaimable == 2


def test_write_back_begins_again_when_copies_are_gone():
    pool = make(4, 4)
    cache(pool, 1, 2)
    assert pool.write_back(9) == 2
    carry_out(pool)
    assert pool.write_back(9) == 0
    pool.free_mem(pool.alloc_mem(4, DRAM))
    pool.check()
    assert pool.write_back(9) == 2


def test_a_stem_that_could_not_go_can_once_it_is_written_back():
    pool = make(6, 8)
    pool.swaps.enabled = False
    stem = cache(pool, 1, 2)
    for last in (1, 2):
        pool.insert([*tokens_of(1, 2), *[last] * C], [*hold(pool, 1, 2), *pool.alloc_mem(1)])
    pool.free_mem([*stem, *stem])
    cache(pool, 2, 2)
    pool.alloc_mem(2)
    assert media(pool, 1, 2) == (2, 0) and media(pool, 2, 2) == (0, 0)
    pool.swaps.enabled = True
    assert pool.write_back(2) == 2
    pool.check()
    carry_out(pool)
    pool.alloc_mem(2)
    assert media(pool, 1, 2) == (0, 2) and pool.swaps.take() == []


def test_the_end_of_a_prefix_makes_way_in_dram_for_its_start():
    pool = make(4, 2)
    cache(pool, 1, 4)
    assert pool.swap_out(2) == 2
    carry_out(pool)
    assert media(pool, 1, 4) == (2, 2)
    pool.alloc_mem(3)
    carry_out(pool)
    assert media(pool, 1, 4) == (1, 2)
    pool.check()


def test_swap_in_gives_hbm_and_leaves_the_copy_in_dram():
    pool = make(4, 8)
    cache(pool, 1, 3, DRAM)
    there = hold(pool, 1, 3)
    assert [address.medium for address in there] == [DRAM] * 3
    fresh = pool.swap_in(there)
    assert [address.medium for address in fresh] == [HBM] * 3
    assert media(pool, 1, 3) == (0, 3), "the bytes are not in HBM yet"
    [order] = carry_out(pool)
    assert not order.out
    assert (order.hbm, order.dram) == tuple(tuple(a.index for a in ends) for ends in (fresh, there))
    assert media(pool, 1, 3) == (3, 0) and counts(pool) == ((1, 3, 0), (5, 0, 3)) and pool.stats().swapped_in == 3
    with pool.match([*tokens_of(1, 3), 0]) as match:
        assert match.addresses == tuple(fresh)
    with pytest.raises(StaleAddress):
        pool.free_mem(there)  # given back by the order
    pool.free_mem(fresh)
    pool.alloc_mem(4)
    assert pool.swaps.take() == [] and media(pool, 1, 3) == (0, 3)
    pool.check()


def test_swap_in_changes_nothing_when_it_is_refused():
    pool = make(2, 4)
    cache(pool, 1, 3, DRAM)
    there = hold(pool, 1, 3)
    [mine] = pool.alloc_mem(1)
    before = counts(pool)
    for bad, error in (
        (there, PoolFull),
        ([mine], ForeignAddress),
        ([there[0], there[0]], StaleAddress),
        ([there[0]._replace(generation=9)], StaleAddress),
    ):
        with pytest.raises(error):
            pool.swap_in(bad)
        assert counts(pool) == before and len(pool.swaps) == 0
    assert pool.swap_in([]) == []
    pool.check()


def test_blocks_that_are_in_no_index_can_be_swapped_in():
    pool = make()
    there = pool.alloc_mem(2, DRAM)
    fresh = pool.swap_in(there)
    carry_out(pool)
    assert counts(pool) == ((2, 2, 0), (8, 0, 0))
    pool.insert(tokens_of(1, 2), fresh)
    assert media(pool, 1, 2) == (2, 0)


def test_two_who_swap_in_the_same_keep_what_they_have():
    pool = make()
    cache(pool, 1, 2, DRAM)
    first, second = hold(pool, 1, 2), hold(pool, 1, 2)
    mine, other = pool.swap_in(first), pool.swap_in(second)
    carry_out(pool)
    assert counts(pool) == ((0, 4, 0), (6, 0, 2)) and hold(pool, 1, 2) == mine
    pool.free_mem(other)
    pool.free_mem([*mine, *mine])
    assert counts(pool) == ((2, 0, 2), (6, 0, 2))
    pool.check()


# -- hits --------------------------------------------------------------------------------------------------------------


def test_a_hit_mixes_media_and_is_counted():
    pool = make(4, 8)
    head = cache(pool, 1, 2)
    tail = pool.alloc_mem(2, DRAM)
    pool.insert(tokens_of(1, 4), [*hold(pool, 1, 2), *tail])
    match = pool.match([*tokens_of(1, 4), 0])
    assert match.addresses == (*head, *tail)
    stats = pool.stats()
    assert (stats.hit_tokens, stats.dram_hit_tokens) == ((2 + 4) * C, 2 * C)
    pool.check()


def test_each_medium_has_its_own_duplicates():
    pool = make(4, 8)
    tokens = tokens_of(1, 2)
    first, there, again = pool.alloc_mem(2), pool.alloc_mem(2, DRAM), pool.alloc_mem(1, DRAM)
    assert pool.insert(tokens, first) == [] and pool.insert(tokens, there) == []
    assert pool.insert(tokens, [again[0], there[1]]) == again
    pool.free_mem([*first, *there, *again])
    assert counts(pool) == ((2, 0, 2), (6, 0, 2)) and media(pool, 1, 2) == (2, 0)
    assert pool.delete(tokens_of(1, 1)) == 4 and counts(pool) == ((4, 0, 0), (8, 0, 0))
    pool.check()


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_failed_swap_out_loses_the_copy_and_no_more():
    pool = make()
    cache(pool, 1, 4)
    pool.swap_out(1)
    carry_out(pool, well=False)
    assert media(pool, 1, 4) == (3, 0) and counts(pool) == ((1, 0, 3), (8, 0, 0))
    pool.write_back(2)
    carry_out(pool, well=False)
    assert media(pool, 1, 4) == (3, 0) and counts(pool) == ((1, 0, 3), (8, 0, 0))


def test_a_lost_block_takes_with_it_what_continues_it():
    pool = make()
    cache(pool, 1, 4)
    pool.swap_out(1)
    carry_out(pool)  # the last is in DRAM
    pool.swap_out(1)
    carry_out(pool, well=False)  # the one before is nowhere
    assert media(pool, 1, 4) == (2, 0) and counts(pool) == ((2, 0, 2), (8, 0, 0))


def test_a_failed_swap_in_gives_back_both_ends_and_forgets_the_prefix():
    pool = make()
    cache(pool, 1, 3, DRAM)
    head, *_ = hold(pool, 1, 1)
    fresh = pool.swap_in(hold(pool, 1, 3)[1:])
    carry_out(pool, well=False)
    assert media(pool, 1, 3) == (0, 1), "its copy in DRAM cannot be read"
    with pytest.raises(StaleAddress):
        pool.free_mem(fresh)
    pool.free_mem([head, head])
    assert counts(pool) == ((4, 0, 0), (7, 0, 1))
    pool.check()


def test_an_insert_heals_a_prefix_whose_copy_is_lost():
    pool = make()
    cache(pool, 1, 2)
    pool.swap_out(2)
    orders = pool.swaps.take()
    cache(pool, 1, 2)
    for order in orders:
        pool.swaps.failed(order)
    assert media(pool, 1, 2) == (2, 0)
    pool.check()


@pytest.mark.parametrize("well", [True, False])
@pytest.mark.parametrize("how", ["delete", "clear"])
def test_a_prefix_may_be_forgotten_while_an_order_is_open(how, well):
    pool = make()
    cache(pool, 1, 4)
    pool.swap_out(2)
    out = pool.swaps.take()
    cache(pool, 2, 1, DRAM)
    fresh = pool.swap_in(hold(pool, 2, 1))
    back = pool.swaps.take()
    assert pool.clear() == 3 if how == "clear" else pool.delete(tokens_of(1, 1)) + pool.delete(tokens_of(2, 1)) == 3
    pool.check()
    again = cache(pool, 1, 1)  # the same tokens with other bytes
    for order in (*out, *back):
        (pool.swaps.done if well else pool.swaps.failed)(order)
        pool.check()
    assert media(pool, 1, 4) == (1, 0) and media(pool, 2, 1) == (0, 0)
    with pool.match([*tokens_of(1, 1), 0]) as match:
        assert match.addresses == tuple(again)
    if well:
        pool.free_mem(fresh)
    assert counts(pool) == ((3, 0, 1), (8, 0, 0))


def test_room_may_be_made_above_an_open_order():
    pool = make(3, 8)
    cache(pool, 1, 3)
    pool.swap_out(1)
    order = pool.swaps.take()
    pool.swaps.enabled = False
    pool.alloc_mem(3)  # the start of the prefix goes, with what is on its way
    for swap in order:
        pool.swaps.done(swap)
    assert counts(pool) == ((0, 3, 0), (8, 0, 0)) and pool.stats().prefix_blocks == 0
    pool.check()


def test_an_order_ends_once():
    pool = make()
    cache(pool, 1, 2)
    pool.swap_out(2)
    [order] = pool.swaps.take()
    pool.swaps.done(order)
    for end in (pool.swaps.done, pool.swaps.failed):
        with pytest.raises(AssertionError):
            end(order)
    pool.check()


# -- wrong calls -------------------------------------------------------------------------------------------------------


def test_foreign_and_stale_dram_addresses_change_nothing():
    pool, other = make(), BlockPool("decode0", 7, 4, C, 8)
    mine, theirs = pool.alloc_mem(2, DRAM), other.alloc_mem(2, DRAM)
    old = pool.alloc_mem(1, DRAM)
    pool.free_mem(old)
    for bad, error in (
        (theirs[0], ForeignAddress),
        (mine[0]._replace(medium=HBM), StaleAddress),
        (mine[0]._replace(index=9), ForeignAddress),
        (mine[0]._replace(index=0), ForeignAddress),
        (mine[0]._replace(index=-1), ForeignAddress),
        (mine[0]._replace(epoch=6), StaleAddress),
        (old[0], StaleAddress),
    ):
        for call in (pool.free_mem, pool.share, lambda given: pool.insert(tokens_of(1, 2), given)):
            with pytest.raises(error):
                call([mine[1], bad])
    assert counts(pool) == ((4, 0, 0), (6, 2, 0)) and media(pool, 1, 2) == (0, 0)
    pool.check()


@pytest.mark.parametrize("medium", [HBM, DRAM])
def test_wrong_inserts_change_nothing(medium):
    pool = make(6, 6)
    known = pool.alloc_mem(2, medium)
    pool.insert(tokens_of(1, 2), known)
    other = DRAM if medium is HBM else HBM
    [fresh] = pool.alloc_mem(1, medium)
    heads = pool.alloc_mem(2, other)
    pool.insert(tokens_of(2, 2), heads)
    before = counts(pool)
    for tokens, addresses in (
        (tokens_of(3, 2), [fresh]),  # too few
        (tokens_of(3, 2), [fresh, fresh]),
        (tokens_of(2, 2), [fresh, fresh]),  # twice, where copies in the other medium are
        (tokens_of(2, 3), [heads[0], fresh, fresh]),
        (tokens_of(3, 1), known[:1]),  # under other tokens
        (tokens_of(1, 2), known[::-1]),
        (tokens_of(2, 2), known),
    ):
        for start in (0, 1):
            with pytest.raises(InvalidAddresses):
                pool.insert(tokens, addresses, start=start if addresses[0] in (*known, *heads) else 0)
        assert counts(pool) == before and pool.stats().prefix_blocks == 4
        pool.check()


def test_a_start_under_another_salt_does_not_lead_there():
    pool = make()
    tokens = tokens_of(1, 2)
    addresses = pool.alloc_mem(2)
    pool.insert(tokens[:C], addresses, "a")
    with pytest.raises(InvalidAddresses):
        pool.insert(tokens, addresses, "b", start=1)
    assert pool.peek([*tokens, 0], "a") == C and pool.peek([*tokens, 0], "b") == 0


def test_one_reference_is_nobody_elses():
    pool = make()
    [address] = pool.alloc_mem(1, DRAM, owner="decode0")
    with pytest.raises(StaleAddress):
        pool.give([address], "decode1")
    pool.share([address])
    with pytest.raises(InvalidAddresses):
        pool.give([address], "decode1")
    assert pool.owned() == {"decode0": 1}
    mine = pool.alloc_mem(1)
    pool.share(mine)
    with pytest.raises(InvalidAddresses):
        pool.give([*mine, *mine], "decode1")
    pool.give(mine, "decode1")
    assert pool.free_owned_by("decode0") == pool.free_owned_by("decode1") == 1
    pool.free_mem([address, *mine])
    assert counts(pool) == ((4, 0, 0), (8, 0, 0))
    pool.check()


# -- the field's lessons -----------------------------------------------------------------------------------------------


def test_lesson_6_a_copy_to_dram_reads_before_its_block_is_given_away():
    """Every order that reads a block of an allocation is in ``take`` at once, and no other allocation hides it."""
    pool = make(4, 16)
    cache(pool, 1, 4)
    given: dict[int, int] = {}
    for number in range(4):
        [address] = pool.alloc_mem(1)
        given[address.index] = number
        reads = [block for order in pool.swaps.take() for block in order.hbm]
        assert reads == [address.index]


def test_lesson_9_a_split_moves_no_pin_while_bytes_are_on_their_way():
    pool = make(8, 8)
    tokens = tokens_of(1, 4)
    cache(pool, 1, 4)
    pool.swap_out(2)
    [order] = pool.swaps.take()  # blocks 3 and 4 are going
    branch = [*tokens[:C], *tokens_of(9, 1)]
    fresh = pool.alloc_mem(1)
    head = hold(pool, 1, 1)
    pool.insert(branch, [*head, *fresh])  # parts the run after block 1
    tail = [*tokens[: 3 * C], *tokens_of(8, 1)]
    other = pool.alloc_mem(4)
    pool.insert(tail, other)  # and after block 3, which is on its way
    pool.check()
    pool.swaps.done(order)
    pool.check()
    assert pool.peek_media([*tokens, 0]) == (3, 1) and pool.peek([*tail, 0]) == 4 * C
    with pool.match([*tokens, 0]) as lease:
        pool.alloc_mem(pool.room())
        assert all(pool.address(a.index, a.medium) == a for a in lease.addresses)
    pool.check()


@pytest.mark.parametrize("well", [True, False])
def test_lesson_12_who_is_aborted_while_swapped_leaves_nothing(well):
    pool = make(4, 8)
    cache(pool, 1, 4, DRAM)
    there = hold(pool, 1, 4)
    fresh = pool.swap_in(there[:2])
    for wrong in (fresh, there[:1], [*fresh, *there[2:]]):
        with pytest.raises(StaleAddress):
            pool.free_mem(wrong)  # bytes are being written to, or read from
    pool.free_mem(there[2:])
    carry_out(pool, well)
    if well:
        pool.free_mem(fresh)
    assert [c[1] for c in counts(pool)] == [0, 0]
    assert pool.clear() and counts(pool) == ((4, 0, 0), (8, 0, 0)) if well else counts(pool) == ((4, 0, 0), (8, 0, 0))


def test_lesson_13_a_lease_on_two_media_ends_once():
    pool = make(4, 8)
    cache(pool, 1, 4)
    pool.swap_out(2)
    carry_out(pool)
    lease = pool.match([*tokens_of(1, 4), 0])
    held = list(lease.addresses)
    lease.release()
    lease.release()
    with pytest.raises(StaleAddress):
        pool.free_mem(held)
    assert counts(pool) == ((2, 0, 2), (6, 0, 2))
    pool.check()
