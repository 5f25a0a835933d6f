"""TokenIndex against a plain dictionary of all prefixes, and its work when it is large."""

import time
from collections import Counter
from random import Random

import numpy as np
import pytest

from jmemserve.kvpool import audit, reclaim
from jmemserve.kvpool.address import Medium
from jmemserve.kvpool.index import TokenIndex
from jmemserve.kvpool.runs import pack

HBM, DRAM = Medium.HBM, Medium.DRAM
C = 2
Key = tuple[bytes, tuple[int, ...]]


def prompt(random: Random, length: int) -> tuple[int, ...]:
    """Prompts that part often after some blocks and seldom at once."""
    tokens, branch = [], random.randrange(2)
    for block in range(length):
        if random.random() < 0.15:
            branch = random.randrange(2)
        tokens += [block, branch]
    return tuple(tokens)


class Pair:
    """The index and its second implementation: a dictionary from every prefix to the locations of its last block."""

    def __init__(self, num_hbm: int, num_dram: int):
        self.held: set[int] = set()
        self.index = TokenIndex(C, (num_hbm, num_dram), self.held.__contains__)
        self.known: dict[Key, dict[Medium, int]] = {}  # DRAM: negative, like a location
        self.way: dict[Key, int] = {}  # DRAM blocks that are expected
        self.free = {HBM: set(range(1, num_hbm + 1)), DRAM: {-block for block in range(1, num_dram + 1)}}
        self.seen: Counter[str] = Counter()

    def keys(self, space: bytes, tokens: tuple[int, ...]) -> list[Key]:
        return [(space, tokens[: (i + 1) * C]) for i in range(len(tokens) // C)]

    def leave(self, gone: list[int]) -> None:
        """These left the index: free unless held."""
        for location in gone:
            if location not in self.held:
                self.free[Medium(location < 0)].add(location)

    def drop_below(self, key: Key) -> list[int]:
        gone = [k for k in self.known if k[0] == key[0] and k[1][: len(key[1])] == key[1]]
        for k in gone:
            self.way.pop(k, None)
        return [location for k in gone for location in self.known.pop(k).values()]

    # -- calls ---------------------------------------------------------------------------------------------------------

    def insert(self, random: Random, space: bytes, tokens: tuple[int, ...]) -> None:
        keys = self.keys(space, tokens)
        locations, expected, used = [], [], []
        for place, key in enumerate(keys):
            here = self.known.get(key, {})
            if here and random.random() < 0.7:
                locations.append(random.choice(list(here.values())))
                continue
            medium = random.choice((HBM, HBM, DRAM))
            if not self.free[medium]:
                break
            location = self.free[medium].pop()
            used.append(location)
            locations.append(location)
            if medium in here or (medium is DRAM and key in self.way):
                expected.append(place)
        self.index.clock += 1
        if len(used) > 1 and random.random() < 0.2:  # wrong: one block for two places
            wrong = [used[0] if location == used[-1] else location for location in locations]
            with pytest.raises(ValueError):
                self.index.insert(pack(tokens, len(wrong) * C), space, wrong)
            self.leave(used)
            return
        after = random.random() < 0.5 and used and len(locations) - len(used)
        if locations and not (after and self.insert_after(space, tokens, locations, len(locations) - len(used))):
            assert self.index.insert(pack(tokens, len(locations) * C), space, locations) == expected
        for place, (key, location) in enumerate(zip(keys, locations, strict=False)):
            if place in expected:
                self.leave([location])
            else:
                self.known.setdefault(key, {})[Medium(location < 0)] = location
        self.seen["duplicates"] += len(expected)

    def insert_after(self, space: bytes, tokens: tuple[int, ...], locations: list[int], known: int) -> bool:
        """The short way, which must do what ``insert`` does or nothing."""
        if any(location in self.index for location in locations[known:]):
            return False
        raw = pack(tokens, len(locations) * C)[known * C * 4 :]
        done = self.index.insert_after(locations[known - 1], raw, space, locations[known:])
        self.seen["short ways"] += done
        return done

    def remove(self, space: bytes, tokens: tuple[int, ...]) -> None:
        key = (space, tokens)
        expected = self.drop_below(key) if tokens and key in self.known else []
        gone = self.index.remove(pack(tokens, len(tokens)), space)
        assert sorted(gone) == sorted(expected)
        self.leave(gone)

    def forget(self, random: Random) -> None:
        if self.known:
            key = random.choice(list(self.known))
            if self.known[key]:
                location = random.choice(list(self.known[key].values()))
                expected = self.drop_below(key)
                gone = self.index.forget(location)
                assert sorted(gone) == sorted(expected) and location in gone
                self.leave(gone)

    def evict(self, random: Random, medium: Medium, n: int) -> None:
        """Spill sometimes, and see that only ends of prefixes and blocks with other copies are gone."""
        place = {location: key for key, here in self.known.items() for location in here.values()}
        lossless = random.random() < 0.3

        def spill(block: int) -> int:
            if not self.free[DRAM] or random.random() < 0.3:
                return 0
            dram = -self.free[DRAM].pop()
            self.way[place[block]] = dram
            self.seen["spilled"] += 1
            return dram

        gone = reclaim.evict(self.index, medium, n, spill, lossless)
        assert len(gone) <= n and len(set(gone)) == len(gone) and not self.held & set(gone)
        for location in gone:
            key = place[location]
            del self.known[key][medium]
            if not self.known[key] and key not in self.way:
                assert not lossless, f"{key} is lost"
                del self.known[key]
        for _, tokens in list(self.known):
            assert len(tokens) == C or any(k[1] == tokens[:-C] for k in self.known)
        self.leave(gone)
        self.seen["evicted"] += len(gone)

    def arrive(self, random: Random) -> None:
        if not self.way:
            return
        key, dram = self.way.popitem()
        if random.random() < 0.7:
            assert self.index.arrived(dram) == []
            self.known[key][DRAM] = -dram
            return
        expected = [] if HBM in self.known[key] else self.drop_below(key)
        gone = self.index.lost(dram)
        assert sorted(gone) == sorted(expected)
        self.leave(gone)
        self.free[DRAM].add(-dram)
        self.seen["lost"] += 1

    def hold(self, random: Random) -> None:
        """Somebody takes a block or gives it back."""
        if self.held and random.random() < 0.6:
            location = self.held.pop()
            if location in self.index:
                self.index.released(location)
            else:
                self.leave([location])
        elif self.known:
            self.held |= set(self.known[random.choice(list(self.known))].values())

    # -- comparing -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        pending = {dram for dram in self.way.values()}
        assert self.index.num_blocks == len(self.known)
        hbm, dram = audit.check(self.index)
        assert hbm == {here[HBM] for here in self.known.values() if HBM in here}
        assert dram - pending == {-here[DRAM] for here in self.known.values() if DRAM in here}
        assert all(here or key in self.way for key, here in self.known.items())

    def find(self, space: bytes, tokens: tuple[int, ...], limit: int) -> None:
        expected = []
        for key in self.keys(space, tokens)[:limit]:
            here = self.known.get(key, {})
            if not here:
                break
            expected.append(here.get(HBM, here.get(DRAM, 0)))
        assert self.index.find(pack(tokens, len(tokens)), space, limit) == expected
        self.seen["found"] += len(expected)


@pytest.mark.parametrize("seed", range(6))
def test_the_index_is_a_dictionary_of_prefixes(seed):
    random = Random(seed)
    pair = Pair(random.randint(10, 60), random.randint(0, 60) if seed else 0)
    for _ in range(2500):
        space, tokens = random.choice((b"a", b"a", b"b")), prompt(random, random.randrange(12))
        what = random.random()
        if what < 0.35:
            pair.insert(random, space, tokens)
        elif what < 0.6:
            pair.evict(random, random.choice((HBM, DRAM)), random.randrange(1, 6))
        elif what < 0.7:
            pair.arrive(random)
        elif what < 0.9:
            pair.hold(random)
        elif what < 0.95:
            pair.remove(space, tokens)
        else:
            pair.forget(random)
        pair.find(space, tokens, random.randrange(14))
        pair.check()
    assert pair.seen["found"] > 1000 and pair.seen["evicted"] > 300 and pair.seen["duplicates"] > 30, pair.seen
    assert pair.seen["short ways"] > 10
    for key in [key for key in pair.known if len(key[1]) == C]:
        pair.remove(*key)
    assert pair.index.num_blocks == pair.index.num_nodes == pair.index.both == 0 and not pair.index.spaces


def test_a_split_keeps_who_holds_what():
    held: set[int] = set()
    index = TokenIndex(C, (20, 0), held.__contains__)
    stem = tuple(range(10 * C))
    index.insert(pack(stem, len(stem)), b"", list(range(1, 11)))
    held |= {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
    for cut, block in ((7, 11), (3, 12), (5, 13)):
        branch = (*stem[: cut * C], 900 + cut, 0)
        index.insert(pack(branch, len(branch)), b"", [*range(1, cut + 1), block])
    assert index.num_nodes == 4 + 3 and index.num_blocks == 13
    assert sorted(reclaim.evict(index, HBM, 20, lambda block: 0)) == [11, 12, 13]
    assert index.find(pack(stem, len(stem)), b"", 10) == list(range(1, 11))
    held -= {9, 10}
    index.released(10)
    assert reclaim.evict(index, HBM, 20, lambda block: 0) == [10, 9]
    audit.check(index)


def test_insert_after_is_insert_or_nothing():
    one, two = (TokenIndex(C, (20, 8), lambda location: False) for _ in range(2))
    tokens = tuple(range(6 * C))
    for index in (one, two):
        index.insert(pack(tokens, 3 * C), b"s", [1, 2, 3])
    assert one.insert_after(3, pack(tokens, 6 * C)[3 * C * 4 :], b"s", [4, -1, 6])
    two.insert(pack(tokens, 6 * C), b"s", [1, 2, 3, 4, -1, 6])
    for index in (one, two):
        audit.check(index)
        assert index.find(pack(tokens, 6 * C), b"s", 9) == [1, 2, 3, 4, -1, 6]
    assert one.num_nodes == two.num_nodes == 1 and audit.snapshot(one) == audit.snapshot(two)
    more = pack((50, 51, 52, 53), 4)
    for before, space, locations in (
        (5, b"s", [10]),  # not in the index
        (2, b"s", [10]),  # not the end of a run
        (-1, b"s", [10]),  # not in HBM
        (6, b"t", [10]),  # under another salt
        (6, b"s", [2, 10]),  # in the index already
        (6, b"s", [10, 10]),  # given twice
    ):
        assert not one.insert_after(before, more[: len(locations) * C * 4], space, locations)
    assert audit.snapshot(one) == audit.snapshot(two)


def test_spaces_do_not_meet_and_none_is_left_empty():
    index = TokenIndex(C, (8, 8), lambda location: False)
    raw = pack((1, 2, 3, 4), 4)
    index.insert(raw, b"a", [1, 2])
    index.insert(raw, b"b", [-1, 3])
    assert (index.find(raw, b"a", 9), index.find(raw, b"b", 9), index.find(raw, b"c", 9)) == ([1, 2], [-1, 3], [])
    assert index.spaces[b"b"].counts == [1, 1]
    assert index.remove(raw, b"c") == [] and sorted(index.remove(raw[: C * 4], b"b")) == [-1, 3]
    assert set(index.spaces) == {b"a"}
    reclaim.evict(index, HBM, 9, lambda block: 0)
    assert not index.spaces


def fill(num_blocks: int, run: int) -> tuple[TokenIndex, np.ndarray]:
    """An index of prompts of ``run`` blocks, of which four each share the first quarter."""
    index = TokenIndex(C, (num_blocks, 0), lambda location: False)
    tokens = np.zeros((num_blocks // run, run * C), np.int32)
    tokens[:] = np.arange(run * C)
    tokens[:, 0] = np.arange(len(tokens)) // 4  # whose first quarter is shared
    tokens[:, run // 4 * C] = np.arange(len(tokens)) + 1_000_000
    block = 1
    for prompt_tokens in tokens:
        raw = prompt_tokens.tobytes()
        known = index.find(raw, b"", run)
        index.clock += 1
        index.insert(raw, b"", [*known, *range(block, block + run - len(known))])
        block += run - len(known)
    return index, tokens


def check_flat(num_blocks: int) -> None:
    """Per block, a large index costs what one costs that is a hundred times smaller (with room for noise)."""
    run, seconds = 100, {}
    for size in (num_blocks // 100, num_blocks):
        start = time.perf_counter()
        index, tokens = fill(size, run)
        stored = index.num_blocks
        found = sum(len(index.find(prompt_tokens.tobytes(), b"", run)) for prompt_tokens in tokens)
        assert found == size and stored == size - size // run * 3 // 4 * (run // 4)
        gone = 0
        while gone < stored // 2:
            gone += len(reclaim.evict(index, HBM, 16, lambda block: 0))
        assert index.num_blocks == stored - gone
        assert len(index.find(tokens[0].tobytes(), b"", run)) == 0, "the oldest is gone"
        assert len(index.find(tokens[-1].tobytes(), b"", run)) == run, "the newest is there"
        assert len(index.remove_all()) == stored - gone and index.num_nodes == 0
        seconds[size] = (time.perf_counter() - start) / size
    small, large = seconds.values()
    assert large < 10 * small + 2e-6, f"{small=} {large=} seconds per block"


def test_work_is_flat_up_to_a_hundred_thousand_blocks():
    check_flat(100_000)


def test_work_is_flat_up_to_a_million_blocks():
    start = time.perf_counter()
    check_flat(1_000_000)
    assert time.perf_counter() - start < 25


def test_a_single_long_run_goes_to_dram_in_little_time():
    """One prompt of 16,384 blocks: half of it goes to DRAM and is found there."""
    size = 16_384
    start = time.perf_counter()
    index = TokenIndex(C, (size, size), lambda location: False)
    raw = np.arange(size * C, dtype=np.int32).tobytes()
    index.insert(raw, b"", list(range(1, size + 1)))
    free = iter(range(1, size + 1))
    gone = reclaim.evict(index, HBM, size // 2, lambda block: next(free))
    assert gone == list(range(size, size // 2, -1))
    for dram in range(1, size // 2 + 1):
        index.arrived(dram)
    assert len(index.find(raw, b"", size)) == size
    audit.check(index)
    assert time.perf_counter() - start < 20  # it takes one or two
