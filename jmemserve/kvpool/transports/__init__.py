"""How the bytes of a piece get from one instance to another. One protocol, several ways; a way is chosen per peer.

source                                          destination
publish(key, piece, frames) -> ticket  ──────▶  fetch(endpoint of the source, ticket, what is expected, where to)
release(key)                           ◀──────  all bytes are in place

A *piece* is n blocks moved together, a *frame* one contiguous run of its bytes handed over in one network call, and a
*ticket* the plain values that travel in a message and let the other side fetch. Publish and fetch block and are called
from worker threads; everything the world can do to them is a TransferError, and a checksum that differs a CorruptBlock.
"""

import dataclasses
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jmemserve.errors import TransferError

Piece = jax.Array | np.ndarray | list[np.ndarray]  # the list: one array per block, DRAM slots read where they lie
Where = jax.sharding.Sharding | list[np.ndarray]  # the list: one writable array per block, DRAM slots

# Best first. The jax way goes through the host as the staged ones do, so it stands before staged-tcp only where both
# ends are accelerators and it saves the copy through our own host buffers.
_ORDER = ("local", "staged-shm", "jax on accelerators", "staged-tcp", "jax")


@dataclasses.dataclass(frozen=True, slots=True)
class PieceSpec:
    """What a piece must look like; compared on both sides before any byte moves."""

    shape: tuple[int, ...]  # [n, ...]: n blocks
    dtype: str
    frames: int  # n: one per block (aggregated); n * 2L: one per block, layer and half (discrete)

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise TransferError(f"a piece has at least one block and no empty axis, not shape {self.shape}")
        if self.frames < 1 or self.num_values % self.frames:
            raise TransferError(f"{self.frames} frames do not divide a piece of shape {self.shape} evenly")

    @property
    def num_blocks(self) -> int:
        return self.shape[0]

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.num_values * jnp.dtype(self.dtype).itemsize

    @property
    def frame_bytes(self) -> int:
        return self.nbytes // self.frames

    def ticket(self) -> dict[str, Any]:
        """The part of a ticket that is the same for all transports; ``check_ticket`` reads it."""
        return {"shape": list(self.shape), "dtype": self.dtype, "frames": self.frames}

    def check_ticket(self, ticket: Mapping[str, Any]) -> None:
        """Raise TransferError, with both values, unless the ticket is for a piece like this."""
        shape = ticket.get("shape")
        theirs = (tuple(shape) if isinstance(shape, list | tuple) else shape, ticket.get("dtype"), ticket.get("frames"))
        ours = (self.shape, self.dtype, self.frames)
        if theirs != ours:
            raise TransferError(f"a piece of (shape, dtype, frames) {ours} is expected, but {theirs} was published")

    def check_where(self, where: Where) -> None:
        """Raise TransferError unless a piece like this fits there: n writable contiguous blocks, or any sharding."""
        if isinstance(where, jax.sharding.Sharding):
            return
        if len(where) != self.num_blocks:
            raise TransferError(f"a piece of {self.num_blocks} blocks needs as many slots, not {len(where)}")
        for slot in where:
            if slot.shape != self.shape[1:] or slot.dtype != jnp.dtype(self.dtype):
                ours = (self.shape[1:], self.dtype)
                raise TransferError(f"a block of {ours} does not fit into a slot of {(slot.shape, str(slot.dtype))}")
            if not (slot.flags.writeable and slot.flags.c_contiguous):
                raise TransferError("a slot must be writable and contiguous")


def spec_of(piece: Piece, frames: int) -> PieceSpec:
    """What a piece is. Raises TransferError if its blocks differ, or if the frames do not divide it."""
    if not isinstance(piece, list):
        return PieceSpec(tuple(piece.shape), str(piece.dtype), frames)
    kinds = {(block.shape, str(block.dtype)) for block in piece}
    if len(kinds) != 1:
        raise TransferError(f"the blocks of a piece must be alike, not {sorted(kinds)}")
    ((shape, dtype),) = kinds
    return PieceSpec((len(piece), *shape), dtype, frames)


class Counters:
    """What one transport has done, seen from its side. Read freely; written from several threads."""

    def __init__(self) -> None:
        self.network_calls = 0  # frames sent and frames fetched
        self.bytes = 0
        self.failures = 0  # publishes and fetches that raised
        self._lock = threading.Lock()

    def moved(self, network_calls: int, nbytes: int) -> None:
        """Count frames that were sent or fetched, and their bytes."""
        with self._lock:
            self.network_calls += network_calls
            self.bytes += nbytes

    def failed(self) -> None:
        """Count one publish or fetch that raised."""
        with self._lock:
            self.failures += 1


class Transport(Protocol):
    """One way to move pieces. Instances link up by exchanging the ``endpoint`` of every transport they have."""

    name: str
    counters: Counters

    def endpoint(self) -> dict[str, Any]:
        """Plain msgpack values: what a peer needs to fetch from here; sent once, at link-up."""
        ...

    def reaches(self, endpoint: Mapping[str, Any]) -> bool:
        """Whether this side can fetch from the peer behind the endpoint. May probe, for at most 2 seconds."""
        ...

    def publish(self, key: str, piece: Piece, frames: int, checksum: bool = True) -> dict[str, Any]:
        """Make a piece available until ``release(key)`` and return its ticket, plain values below 64 KiB.

        The arrays of a list must not change before the release. Waits for the device where it must. Raises
        TransferError.
        """
        ...

    def fetch(
        self, endpoint: Mapping[str, Any], ticket: Mapping[str, Any], spec: PieceSpec, where: Where, timeout_s: float
    ) -> jax.Array | None:
        """Bring a piece here, once per ticket: an array with that sharding, or None when it lies in the slots given.

        Raises TransferError: nothing like ``spec`` is published, it was released, the peer died, or time ran out; and
        CorruptBlock. What the slots hold after an error is undefined.
        """
        ...

    def release(self, key: str) -> None:
        """Give the piece back. A fetch under way may fail. Unknown keys are fine."""
        ...

    def close(self) -> None:
        """Release all, and end every thread and socket of this transport. Later calls raise TransferError."""
        ...


def choose(mine: Sequence[Transport], theirs: Mapping[str, Mapping[str, Any]]) -> Transport:
    """The best of my transports that a peer has too and that reaches it, given the peer's endpoints by name.

    Raises TransferError with both lists if there is none.
    """
    by_name = {transport.name: transport for transport in mine}
    for wish in _ORDER:
        name = wish.split()[0]
        transport, endpoint = by_name.get(name), theirs.get(name)
        if transport is None or not isinstance(endpoint, Mapping):
            continue
        if wish != name and "cpu" in (transport.endpoint().get("platform"), endpoint.get("platform")):
            continue
        if transport.reaches(endpoint):
            return transport
    raise TransferError(f"no common way to the peer: here are {sorted(by_name)}, there are {sorted(theirs)}")
