"""A hold on cached blocks that ends once."""

from collections.abc import Callable, Sequence

from jmemserve.kvpool.address import BlockAddress


class Match:
    """A lease on the cached blocks of a prefix: one reference on each, until ``release`` or ``take``.

    The blocks may lie in both media; those in DRAM are swapped in before a step can use them. As a context manager it
    releases at the end of the block what was not taken.
    """

    __slots__ = ("_addresses", "_free", "num_tokens")

    def __init__(self, free: Callable[[Sequence[BlockAddress]], None], addresses: list[BlockAddress], num_tokens: int):
        self._free: Callable[[Sequence[BlockAddress]], None] | None = free
        self._addresses = addresses
        self.num_tokens = num_tokens  # covered by the addresses: whole blocks

    @property
    def addresses(self) -> tuple[BlockAddress, ...]:
        """The blocks in token order; empty once released or taken."""
        return tuple(self._addresses)

    def release(self) -> None:
        """Give the references back. Further calls do nothing."""
        free, self._free = self._free, None
        addresses, self._addresses = self._addresses, []
        if free is not None:
            free(addresses)

    def take(self) -> list[BlockAddress]:
        """End the lease and return the addresses; the caller owns the references and frees them."""
        self._free = None
        addresses, self._addresses = self._addresses, []
        return addresses

    def __enter__(self) -> "Match":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
