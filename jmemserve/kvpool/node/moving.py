"""A transfer as its caller sees it, and what it must be to have a chance."""

from collections.abc import Sequence
from concurrent.futures import Future

from jmemserve.errors import InvalidTransfer
from jmemserve.kvpool import transfer as tx
from jmemserve.kvpool.address import BlockAddress
from jmemserve.kvpool.blocks import BlockPool


def settle[T](future: Future[T], value: T, error: Exception | None) -> None:
    """Resolve a future with an error, or with a value if there is none."""
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


class Transfer:
    """A transfer on its way. ``result`` gives the addresses at the destination."""

    def __init__(self, transfer_id: str, destination: str):
        self.transfer_id = transfer_id
        self.destination = destination
        self.future: Future[list[BlockAddress]] = Future()

    def done(self) -> bool:
        """It has ended, well or not."""
        return self.future.done()

    def result(self, timeout_s: float | None = None) -> list[BlockAddress]:
        """Wait for its end, on any thread but the owner's. Raises TransferError, or TimeoutError if it goes on."""
        return self.future.result(timeout_s)


def check_private(private: bytes | None) -> None:
    if private is not None and len(private) > tx.MAX_PRIVATE:
        raise InvalidTransfer(f"the private part has {len(private):,} bytes; at most {tx.MAX_PRIVATE:,} travel")


def check_transfer(
    blocks: BlockPool,
    instance: str,
    tokens: Sequence[int] | None,
    source: Sequence[BlockAddress],
    destination: Sequence[BlockAddress] | None,
    private: bytes | None,
    ready: int | None,
) -> None:
    """Raise InvalidTransfer for what can never work."""
    check_private(private)
    if not source:
        raise InvalidTransfer("a transfer needs at least one source address")
    if tokens is not None and len(tokens) // blocks.block_size > len(source):
        raise InvalidTransfer(f"{len(tokens)} tokens fill more than the {len(source)} blocks given")
    if ready is not None and not 0 <= ready <= len(source):
        raise InvalidTransfer(f"ready={ready} is not within the {len(source)} blocks given")
    if destination is not None:
        if len(destination) != len(source):
            raise InvalidTransfer(f"{len(source)} source addresses need as many destinations, not {len(destination)}")
        if foreign := next((address for address in destination if address.instance != instance), None):
            raise InvalidTransfer(f"the destination {foreign} is not at {instance}")
