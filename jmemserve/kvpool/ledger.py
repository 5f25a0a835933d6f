"""Who holds which block of one medium: reference counts, generations and addresses, as flat lists.

            take                    last drop + free
    free ---------> held (refs > 0) ----------------> free, generation + 1
                     ^    |
                hold |    | last drop + keep
                     |    v
                    cached (refs == 0, in the index) ---evict---> free, generation + 1

Index 0 is nobody's (kernels write padding there), so the blocks are 1 .. capacity.
"""

from collections.abc import Iterable, Sequence

from jmemserve.errors import ForeignAddress, StaleAddress
from jmemserve.kvpool.address import BlockAddress, Medium


class Ledger:
    """The states of ``capacity`` blocks of one medium. Only ``live`` mistrusts its caller."""

    __slots__ = (
        "addresses",
        "capacity",
        "epoch",
        "free_list",
        "generations",
        "instance",
        "medium",
        "num_cached",
        "num_refs",
        "refs",
    )

    def __init__(self, instance: str, epoch: int, medium: Medium, capacity: int):
        assert capacity >= 0, f"{capacity=}"
        self.instance, self.epoch, self.medium, self.capacity = instance, epoch, medium, capacity
        self.refs = [0] * (capacity + 1)
        self.generations = [0] * (capacity + 1)
        self.addresses: list[BlockAddress | None] = [None] * (capacity + 1)  # of the current generation, once asked for
        self.free_list = list(range(capacity, 0, -1))  # a stack; low indices leave first
        self.num_cached = 0
        self.num_refs = 0  # Invariant: sum(refs), the references given out

    @property
    def num_free(self) -> int:
        return len(self.free_list)

    @property
    def num_held(self) -> int:
        return self.capacity - len(self.free_list) - self.num_cached

    @property
    def room(self) -> int:
        """Blocks that an allocation can get: free and cached."""
        return len(self.free_list) + self.num_cached

    def begin_life(self, epoch: int) -> None:
        """All addresses are void from now on. No block is held."""
        self.epoch = epoch
        self.addresses = [None] * (self.capacity + 1)

    def address(self, block: int) -> BlockAddress:
        """The address of a block in its current generation."""
        address = self.addresses[block]
        if address is None:
            generation = self.generations[block]
            address = BlockAddress(self.instance, self.epoch, self.medium, block, generation)
            self.addresses[block] = address
        return address

    def live(self, address: BlockAddress) -> int:
        """The index of an address whose block somebody holds. Raises ForeignAddress or StaleAddress."""
        index = address.index
        known = 0 < index <= self.capacity and address.medium is self.medium and address.instance == self.instance
        if not known:
            raise ForeignAddress(
                f"{address} is none of the {self.capacity} {self.medium.name} blocks of {self.instance}"
            )
        if self.refs[index] == 0 or address != self.address(index):
            now = self.address(index)
            holders = self.refs[index]
            raise StaleAddress(f"{address} was freed: the block is {now} now, with {holders} references")
        return index

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

    def name(self, blocks: Iterable[int]) -> list[BlockAddress]:
        """The addresses of blocks that were taken just now."""
        whose, generations, known, new = (self.instance, self.epoch, self.medium), self.generations, self.addresses, []
        make = tuple.__new__  # a third of the time of BlockAddress(...)
        for block in blocks:
            address = known[block] = make(BlockAddress, (*whose, block, generations[block]))
            new.append(address)
        return new

    def hold(self, blocks: Iterable[int]) -> None:
        """Add one reference to each of these held or cached blocks."""
        refs, count, woken = self.refs, 0, 0
        for block in blocks:
            if refs[block] == 0:
                woken += 1
            refs[block] += 1
            count += 1
        self.num_cached -= woken
        self.num_refs += count

    def drop(self, block: int) -> int:
        """Give back one reference and return how many are left; at 0 the caller goes on with ``keep`` or ``free``."""
        left = self.refs[block] - 1
        assert left >= 0, f"block {block} has {left + 1} references, cannot drop one"
        self.refs[block] = left
        self.num_refs -= 1
        return left

    def drop_all(self, blocks: Iterable[int], indexed: Sequence[object]) -> list[int]:
        """Give back one reference on each; return those that became cached, since ``indexed[block]`` is something."""
        refs, cached, count = self.refs, [], 0
        for block in blocks:
            left = refs[block] - 1
            refs[block] = left
            count += 1
            if left == 0:
                if indexed[block] is not None:
                    cached.append(block)
                else:
                    self.generations[block] += 1
                    self.addresses[block] = None
                    self.free_list.append(block)
        self.num_refs -= count
        self.num_cached += len(cached)
        return cached

    def keep(self, block: int) -> None:
        """The block without references is in the index: it becomes cached."""
        self.num_cached += 1

    def free(self, block: int) -> None:
        """The block without references is in no index: it becomes free."""
        self.generations[block] += 1
        self.addresses[block] = None
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
                assert block in indexed, f"{self.medium.name} block {block} is neither free nor held nor in the index"
                cached += 1
            address = self.addresses[block]
            if address is not None:
                expected = BlockAddress(self.instance, self.epoch, self.medium, block, self.generations[block])
                assert address == expected, f"{address} != {expected}"
        free = len(free_set)
        assert cached == self.num_cached, f"{cached=} != {self.num_cached=}"
        assert free + held + cached == self.capacity, f"{free=} + {held=} + {cached=} != {self.capacity=}"
        assert sum(self.refs) == self.num_refs, f"{sum(self.refs)=} != {self.num_refs=}"
