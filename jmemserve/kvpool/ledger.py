"""Who holds which block of one medium: reference counts and generations, as flat lists.

            take                    last drop + free
    free ---------> held (refs > 0) ----------------> free, generation + 1
                     ^    |
                hold |    | last drop + keep
                     |    v
                    cached (refs == 0, in the index) ---evict---> free, generation + 1

Index 0 is nobody's (kernels write padding there), so the blocks are 1 .. capacity.
"""

from collections.abc import Iterable


class Ledger:
    """The states of ``capacity`` blocks. It trusts its caller, the pool, which validates addresses before."""

    __slots__ = ("capacity", "free_list", "generations", "num_cached", "num_refs", "refs")

    def __init__(self, capacity: int):
        assert capacity >= 0, f"{capacity=}"
        self.capacity = capacity
        self.refs = [0] * (capacity + 1)
        self.generations = [0] * (capacity + 1)
        self.free_list = list(range(capacity, 0, -1))  # a stack; low indices leave first
        self.num_cached = 0
        self.num_refs = 0  # Invariant: sum(refs), the references given out

    @property
    def num_free(self) -> int:
        return len(self.free_list)

    @property
    def num_held(self) -> int:
        return self.capacity - len(self.free_list) - self.num_cached

    def take(self, n: int) -> list[int]:
        """Turn n free blocks into held ones with one reference each. There must be as many."""
        cut = len(self.free_list) - n
        assert cut >= 0, f"{n=} > free={len(self.free_list)}"
        blocks = self.free_list[cut:]
        del self.free_list[cut:]
        blocks.reverse()
        refs = self.refs
        for block in blocks:
            refs[block] = 1
        self.num_refs += n
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """Add one reference to each of these held or cached blocks."""
        refs = self.refs
        for block in blocks:
            if refs[block] == 0:
                self.num_cached -= 1
            refs[block] += 1
            self.num_refs += 1

    def drop(self, block: int) -> int:
        """Give back one reference and return how many are left; at 0 the caller goes on with ``keep`` or ``free``."""
        left = self.refs[block] - 1
        assert left >= 0, f"block {block} has {left + 1} references, cannot drop one"
        self.refs[block] = left
        self.num_refs -= 1
        return left

    def keep(self, block: int) -> None:
        """The block without references is in the index: it becomes cached."""
        self.num_cached += 1

    def free(self, block: int) -> None:
        """The block without references is in no index: it becomes free."""
        self.generations[block] += 1
        self.free_list.append(block)

    def evict(self, block: int) -> None:
        """The cached block left the index: it becomes free."""
        self.num_cached -= 1
        self.free(block)

    def check(self, indexed: set[int]) -> None:
        """Assert that the counts are what the flat lists say, given the blocks that the index names."""
        free_set = set(self.free_list)
        assert len(free_set) == len(self.free_list), f"a block is free twice: {sorted(self.free_list)}"
        assert 0 not in free_set and self.refs[0] == 0 and 0 not in indexed, "block 0 is in use"
        assert all(0 < block <= self.capacity for block in free_set | indexed), f"a block is not in 1..{self.capacity}"
        held = cached = 0
        for block in range(1, self.capacity + 1):
            refs = self.refs[block]
            assert refs >= 0, f"block {block} has {refs} references"
            if block in free_set:
                assert refs == 0 and block not in indexed, f"free block {block}: {refs=}, {block in indexed=}"
            elif refs:
                held += 1
            else:
                assert block in indexed, f"block {block} is neither free nor held nor in the index"
                cached += 1
        free = len(free_set)
        assert cached == self.num_cached, f"{cached=} != {self.num_cached=}"
        assert free + held + cached == self.capacity, f"{free=} + {held=} + {cached=} != {self.capacity=}"
        assert sum(self.refs) == self.num_refs, f"{sum(self.refs)=} != {self.num_refs=}"
