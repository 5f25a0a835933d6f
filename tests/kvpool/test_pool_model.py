"""BlockPool driven by random operations against a dictionary, with ``check()`` after each."""

import inspect
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jmemserve.errors import ForeignAddress, PoolFull, StaleAddress
from jmemserve.kvpool import BlockAddress, BlockPool, Match

C = 2  # tokens per block
Key = tuple[str, tuple[int, ...]]

prompts = st.lists(st.integers(0, 1), max_size=9).map(tuple)  # few tokens: prefixes meet often
salts = st.sampled_from(["", "", "b"])


class PoolMachine(RuleBasedStateMachine):
    """The model: the index as a dictionary from prefixes to addresses, and a list of the references given out."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool("a", 1, num_blocks, C)
        self.index: dict[Key, BlockAddress] = {}
        self.given: list[tuple[list[BlockAddress], tuple[int, ...], str]] = []  # addresses, tokens, salt
        self.leases: list[Match] = []
        self.past: list[BlockAddress] = []

    # -- the model -----------------------------------------------------------------------------------------------------

    def refs(self, address: BlockAddress) -> int:
        lists = [addresses for addresses, _, _ in self.given] + [list(lease.addresses) for lease in self.leases]
        return sum(addresses.count(address) for addresses in lists)

    def prefixes(self, tokens: tuple[int, ...], salt: str, count: int) -> list[Key]:
        return [(salt, tokens[: (i + 1) * C]) for i in range(count)]

    def expected(self, tokens: tuple[int, ...], salt: str) -> list[BlockAddress]:
        found = []
        for key in self.prefixes(tokens, salt, max(0, len(tokens) - 1) // C):
            if key not in self.index:
                break
            found.append(self.index[key])
        return found

    def forget_evicted(self) -> None:
        """After an allocation the pool may have dropped prefixes; see that it only dropped what it could."""
        pool_has = {(salt, tokens): self.pool.peek((*tokens, 0), salt) == len(tokens) for salt, tokens in self.index}
        for key, present in pool_has.items():
            if not present:
                self.past.append(self.index.pop(key))
        for salt, tokens in self.index:  # no gap in a prefix that is left
            assert all(key in self.index for key in self.prefixes(tokens, salt, len(tokens) // C))

    # -- the rules -----------------------------------------------------------------------------------------------------

    @rule(n=st.integers(0, 6))
    def alloc(self, n: int) -> None:
        held = {address for address in self.all_given() if self.refs(address)}
        room = self.pool.capacity - len(held)
        assert self.pool.room() == room
        before = dict(self.index)
        if n > room:
            with pytest.raises(PoolFull):
                self.pool.alloc_mem(n)
            self.forget_evicted()
            assert self.index == before
            return
        evictions = max(0, n - self.pool.free)
        addresses = self.pool.alloc_mem(n)
        assert len(set(addresses)) == n and not held & set(addresses)
        assert not set(addresses) & set(self.past), "an old address came back"
        self.forget_evicted()
        if evictions == 0:
            assert self.index == before
        self.given.append((addresses, (), ""))

    @rule(pick=st.integers(0, 99), tokens=prompts, salt=salts)
    def insert(self, pick: int, tokens: tuple[int, ...], salt: str) -> None:
        """Extend a list of blocks to a prefix, as a sequence does: matched ones first, fresh ones after."""
        fresh = [entry for entry in self.given if entry[1] == () and entry[0]]
        if not fresh:
            return
        entry = fresh[pick % len(fresh)]
        addresses = entry[0]
        tokens = tokens[: len(addresses) * C + 1]
        duplicates = self.pool.insert(tokens[: len(addresses) * C], addresses, salt)
        expected = []
        for key, address in zip(
            self.prefixes(tokens, salt, min(len(tokens) // C, len(addresses))), addresses, strict=False
        ):
            if self.index.setdefault(key, address) != address:
                expected.append(address)
        assert duplicates == expected
        self.given[self.given.index(entry)] = (addresses, tokens or (-1,), salt)

    @rule(pick=st.integers(0, 99))
    def insert_again(self, pick: int) -> None:
        done = [entry for entry in self.given if entry[1] and entry[1] != (-1,)]
        if not done:
            return
        addresses, tokens, salt = done[pick % len(done)]
        tokens = tokens[: len(addresses) * C]
        keys = self.prefixes(tokens, salt, len(tokens) // C)
        if any(
            address in self.index.values() and self.index.get(key) != address
            for key, address in zip(keys, addresses, strict=False)
        ):
            return  # an address whose place is elsewhere in the index: a wrong call
        expected = [a for key, a in zip(keys, addresses, strict=False) if self.index.setdefault(key, a) != a]
        assert self.pool.insert(tokens, addresses, salt) == expected

    @rule(tokens=prompts, salt=salts)
    def serve(self, tokens: tuple[int, ...], salt: str) -> None:
        """What a request does: match, allocate what lacks, index the whole blocks."""
        count = len(tokens) // C
        with self.pool.match(tokens, salt) as lease:
            found = list(lease.addresses)
            assert found == self.expected(tokens, salt)
            if count - len(found) > self.pool.room():
                return self.drop_living_from_past()
            addresses = lease.take()
        self.given.append((addresses, (-1,), ""))
        fresh = self.pool.alloc_mem(count - len(found))
        assert not set(fresh) & set(self.past), "an old address came back"
        addresses += fresh
        self.forget_evicted()
        duplicates = self.pool.insert(tokens, addresses, salt)
        keys = self.prefixes(tokens, salt, count)
        expected = [a for key, a in zip(keys, addresses, strict=True) if self.index.setdefault(key, a) != a]
        assert duplicates == expected

    @rule(tokens=prompts, salt=salts)
    def match(self, tokens: tuple[int, ...], salt: str) -> None:
        expected = self.expected(tokens, salt)
        assert self.pool.peek(tokens, salt) == len(expected) * C
        lease = self.pool.match(tokens, salt)
        assert list(lease.addresses) == expected and lease.num_tokens == len(expected) * C
        self.leases.append(lease)

    @rule(pick=st.integers(0, 99), times=st.integers(1, 2))
    def release(self, pick: int, times: int) -> None:
        if self.leases:
            lease = self.leases.pop(pick % len(self.leases))
            self.past += [address for address in lease.addresses if address not in self.index.values()]
            for _ in range(times):
                lease.release()
            self.drop_living_from_past()

    @rule(pick=st.integers(0, 99))
    def take(self, pick: int) -> None:
        if self.leases:
            lease = self.leases.pop(pick % len(self.leases))
            self.given.append((lease.take(), (-1,), ""))
            assert lease.addresses == ()
            lease.release()

    @rule(pick=st.integers(0, 99), cut=st.integers(0, 4))
    def free(self, pick: int, cut: int) -> None:
        if self.given:
            addresses, _, _ = self.given.pop(pick % len(self.given))
            self.pool.free_mem(addresses[cut:])
            self.past += addresses[cut:]
            if addresses[:cut]:
                self.given.append((addresses[:cut], (-1,), ""))
            self.drop_living_from_past()

    @rule(tokens=prompts, salt=salts)
    def delete(self, tokens: tuple[int, ...], salt: str) -> None:
        whole = tokens[: len(tokens) // C * C]
        gone = [k for k in self.index if whole and k[0] == salt and k[1][: len(whole)] == whole]
        assert self.pool.delete(tokens, salt) == len(gone)
        self.past += [self.index.pop(key) for key in gone]
        self.drop_living_from_past()

    @rule()
    def clear(self) -> None:
        assert self.pool.clear() == len(self.index)
        self.past += self.index.values()
        self.index.clear()
        self.drop_living_from_past()

    @rule(pick=st.integers(0, 99), with_good=st.booleans())
    def misuse(self, pick: int, with_good: bool) -> None:
        """Stale, foreign and doubly freed addresses raise and change nothing (the invariants below see to that)."""
        good = next((addresses[:1] for addresses, _, _ in self.given if addresses), []) if with_good else []
        bad = list(self.past)
        if bad:
            with pytest.raises(StaleAddress):
                self.pool.free_mem([*good, bad[pick % len(bad)]])
            with pytest.raises(StaleAddress):
                self.pool.insert((5,) * C, [bad[pick % len(bad)]])
        if good:
            with pytest.raises(StaleAddress):
                self.pool.free_mem(good * (self.refs(good[0]) + 1))
        with pytest.raises(ForeignAddress):
            self.pool.free_mem([*good, BlockAddress("b", 1, self.pool.address(1).medium, 1, 0)])

    def all_given(self) -> set[BlockAddress]:
        return {a for addresses, _, _ in self.given for a in addresses} | {a for x in self.leases for a in x.addresses}

    def drop_living_from_past(self) -> None:
        """Past: addresses that nobody holds and that the index does not have."""
        living = self.all_given() | set(self.index.values())
        self.past = [address for address in dict.fromkeys(self.past) if address not in living]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        held = self.all_given()
        cached = set(self.index.values()) - held
        assert (self.pool.held, self.pool.cached) == (len(held), len(cached))
        assert self.pool.free + self.pool.held + self.pool.cached == self.pool.capacity

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for lease in self.leases:
            lease.release()
        for addresses, _, _ in self.given:
            self.pool.free_mem(addresses)
        self.pool.check()
        assert self.pool.held == 0


def test_a_long_life():
    """The same rules by the thousand, in the proportions of a busy server: much is served, little is forgotten."""
    random = Random(0)
    steps = evicted = above_held = 0
    for life in range(40):
        machine = PoolMachine()
        machine.start(num_blocks=random.randint(1, 14))
        rules = {
            machine.serve: 8,
            machine.alloc: 3,
            machine.insert: 3,
            machine.insert_again: 1,
            machine.match: 3,
            machine.release: 3,
            machine.take: 1,
            machine.free: 9,
            machine.delete: 1,
            machine.misuse: 2,
        }
        for step in range(250):
            call = random.choices(list(rules), list(rules.values()))[0]
            if step == 200 + life:
                call = machine.clear
            arguments = {
                "tokens": tuple(random.choices((0, 1), k=random.randint(0, 9))),
                "salt": random.choice(("", "", "b")),
                "pick": random.randint(0, 99),
                "n": random.randint(0, 5),
                "times": random.randint(1, 2),
                "cut": random.choice((0, 0, 0, 1, 2)),
                "with_good": random.random() < 0.5,
            }
            wanted = inspect.signature(call).parameters
            call(**{name: value for name, value in arguments.items() if name in wanted})
            machine.agrees()
            steps += 1
        evicted += machine.pool.stats().evictions
        above_held += machine.pool.forgotten_subtrees
        machine.teardown()
    assert steps == 10_000 and evicted > 500 and above_held > 3, f"{steps=}, {evicted=}, {above_held=}"


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
