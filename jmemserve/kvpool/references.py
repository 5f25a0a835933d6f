"""References on the blocks of both media: whose they are, and what becomes of a block that lost its last one."""

from collections import Counter
from collections.abc import Iterable, Sequence

from jmemserve.errors import InvalidAddresses, StaleAddress
from jmemserve.kvpool.address import BlockAddress
from jmemserve.kvpool.index import TokenIndex
from jmemserve.kvpool.ledger import Ledger
from jmemserve.kvpool.owners import Owners
from jmemserve.kvpool.runs import DRAM, HBM


class References:
    """The ledgers of both media, seen by locations (see ``index``), together with the names of owners."""

    def __init__(self, ledgers: tuple[Ledger, Ledger], index: TokenIndex):
        self._ledgers, self._index = ledgers, index
        self.owners = Owners()
        self.inbound: Counter[int] = Counter()  # references on both ends of copies to HBM, which nobody can free

    def count(self, location: int) -> int:
        """How many there are on a block."""
        return self._ledgers[location < 0].refs[abs(location)]

    def address(self, location: int) -> BlockAddress:
        """The address of a block in its current generation."""
        return self._ledgers[location < 0].address(abs(location))

    def live(self, addresses: Sequence[BlockAddress]) -> list[int]:
        """The locations of addresses that somebody holds. Raises StaleAddress or ForeignAddress."""
        hbm = self._ledgers[HBM]
        known, refs = hbm.addresses, hbm.refs
        try:  # the very objects that this pool gave out, as always
            blocks = [block for address in addresses if known[block := address[3]] is address and refs[block]]
            if len(blocks) == len(addresses):
                return blocks
        except IndexError:
            pass
        ledgers = self._ledgers
        return [
            -ledgers[DRAM].live(address) if address.medium is DRAM else ledgers[HBM].live(address)
            for address in addresses
        ]

    def freeable(self, addresses: Sequence[BlockAddress], owner: str | None) -> list[int]:
        """The locations of addresses on each of which the caller, or that owner, can have a reference to give back.

        Raises StaleAddress or ForeignAddress.
        """
        locations = self.live(addresses)
        if owner is not None:
            for location, count in Counter(locations).items():
                if self.owners.owner(location) != owner or count > 1:
                    raise StaleAddress(f"{self.address(location)} is not held by {owner!r} {count} times")
        elif self.owners or self.inbound or len(set(locations)) < len(locations):
            for location, count in Counter(locations).items():
                anonymous = self.count(location) - (location in self.owners) - self.inbound.get(location, 0)
                if count > anonymous:
                    raise StaleAddress(f"{self.address(location)} is freed {count} times but held {anonymous} times")
        return locations

    def exclusive(self, addresses: Sequence[BlockAddress], owner: str) -> list[int]:
        """The locations of addresses that this owner alone holds, and that are not in the index.

        Raises StaleAddress, ForeignAddress or InvalidAddresses.
        """
        locations = self.freeable(addresses, owner)
        for location in locations:
            if location in self._index or self.count(location) > 1:
                raise InvalidAddresses(f"{self.address(location)} is in use: it is in the index or held twice")
        return locations

    def hold(self, locations: Iterable[int]) -> None:
        """Add one to each of these held or cached blocks."""
        hbm, dram = self._ledgers
        known = list(locations)
        hbm.hold(location for location in known if location > 0)
        dram.hold(-location for location in known if location < 0)

    def drop(self, locations: Sequence[int]) -> None:
        """Give back one on each, the end of a prefix first."""
        index = self._index
        index.clock += 1
        backwards = locations[::-1]
        for ledger, table, sign in zip(self._ledgers, index.tables, (1, -1), strict=True):
            if ledger.capacity:
                blocks = [location * sign for location in backwards if location * sign > 0]
                index.released_all(table[block] for block in ledger.drop_all(blocks, table))

    def settle(self, location: int) -> None:
        """A block lost its last reference: it is cached or free."""
        ledger = self._ledgers[location < 0]
        if location in self._index:
            ledger.keep(abs(location))
            self._index.released(location)
        else:
            ledger.free(abs(location))

    def forget(self, locations: Sequence[int]) -> int:
        """These copies left the index: those that nobody holds become free. Returns how many copies there were."""
        for location in locations:
            ledger = self._ledgers[location < 0]
            if ledger.refs[abs(location)] == 0:
                ledger.evict(abs(location))
        return len(locations)
