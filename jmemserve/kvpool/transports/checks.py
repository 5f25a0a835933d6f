"""What every transport that moves jax arrays must watch: checksums per block, and waiting with a deadline."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jmemserve.errors import CorruptBlock, TransferError
from jmemserve.kvpool.transports import Piece

# [n, ...] on the device or on the host -> uint32[n], the same value for equal bytes wherever they lie. Called from
# worker threads, so it must not run collectives: they would meet those of the steps in another order per device.
Checksums = Callable[[jax.Array | np.ndarray], np.ndarray]


def sums_of(checksums: Checksums, piece: Piece) -> bytes:
    """The checksums of a piece's blocks as they travel in a ticket: little-endian uint32, block by block."""
    parts = [checksums(block[None]) for block in piece] if isinstance(piece, list) else [checksums(piece)]
    return np.concatenate([np.asarray(part) for part in parts]).astype("<u4").tobytes()


def verify(ticket: Mapping[str, Any], checksums: Checksums, arrived: Piece) -> None:
    """Compare what arrived, ready, with the checksums of the ticket, if it has any.

    Raises CorruptBlock with the first block that differs, and TransferError if the ticket's are not checksums.
    """
    theirs = ticket.get("sums")
    if theirs is None:
        return
    ours = sums_of(checksums, arrived)
    if not isinstance(theirs, bytes) or len(theirs) != len(ours):
        raise TransferError(f"the ticket should carry {len(ours)} bytes of checksums, not {theirs!r:.100}")
    if theirs != ours:
        sent, got = np.frombuffer(theirs, "<u4"), np.frombuffer(ours, "<u4")
        block = int(np.nonzero(sent != got)[0][0])
        raise CorruptBlock(f"block {block} of {len(sent)} left with checksum {sent[block]}, not {got[block]}")


def is_ready(array: Any) -> bool:
    """Whether an array has its values, or failed. (``jax.Array`` has the method, its type stubs do not.)"""
    return bool(array.is_ready())


def wait_ready(arrays: list[jax.Array], deadline: float) -> None:
    """Wait until all arrays hold their values. Raises TransferError at the deadline, or if one of them failed.

    ``block_until_ready`` has no deadline, hence the polls: the first few are close together.
    """
    pause_s = 20e-6
    for array in arrays:
        while not is_ready(array):
            if time.monotonic() > deadline:
                raise TransferError(f"{len(arrays)} arrays were not ready in time")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 1e-3)
    try:
        jax.block_until_ready(arrays)
    except jax.errors.JaxRuntimeError as error:
        raise TransferError(f"an array never got its bytes: {error}") from error
