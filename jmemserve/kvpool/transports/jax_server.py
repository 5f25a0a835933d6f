"""Through ``jax.experimental.transfer``: from device to device of another process, by JAX itself.

The server of JAX trusts everybody and has no deadlines, so this file has them and asks for nothing unusual:

* A piece is published as arrays of one device and pulled to one device; the rest is a device_put. JAX sends shard i to
  shard i without comparing shapes, so that meshes of unequal size would get wrong bytes without any error.
* An id is random, published once and pulled once: pulling an id that is unknown or used up hangs for ever.
* Shape, dtype and number of frames are compared before the pull: JAX would read the bytes as whatever is asked for.
* ``timeout=`` of JAX does nothing: ``jax_pulls`` ends what is late.
* A server with another number of channels aborts the process that pulls, and another version of jaxlib may speak
  otherwise: such a peer is not reached. Strange bytes at the port abort the server: bind it to a trusted network only.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental import transfer

from jmemserve.errors import TransferError
from jmemserve.kvpool.transports import Counters, Piece, PieceSpec, Where, spec_of
from jmemserve.kvpool.transports.checks import Checksums, sums_of, verify, wait_ready
from jmemserve.kvpool.transports.jax_pulls import PROBE_S, Puller, listens

CHANNELS = 4  # sockets for bulk data; must be the same at both ends
STAGING_BYTES = 4 << 20  # each; the default of 256 MiB is slower and takes 6 GiB
PARALLEL_COPIES = 8


class JaxServer:
    """The one transfer server of this process, started when it is first needed, on one network address.

    It lives as long as the process: JAX has no way to stop it.
    """

    def __init__(self, device: jax.Device, host: str = "127.0.0.1"):
        self._device: Any = device  # any of the backend whose arrays are to be moved
        self._host = host
        self._server: Any = None
        self._lock = threading.Lock()

    def get(self) -> Any:
        """Raises TransferError if it cannot be started."""
        with self._lock:
            if self._server is None:
                try:
                    self._server = transfer.start_transfer_server(
                        self._device.client,
                        f"{self._host}:0",
                        [f"{self._host}:0"] * CHANNELS,
                        max_num_parallel_copies=PARALLEL_COPIES,
                        transfer_size=STAGING_BYTES,
                    )
                except jax.errors.JaxRuntimeError as error:
                    raise TransferError(f"no transfer server at {self._host}: {error}") from error
            return self._server


class JaxTransport:
    """A ``Transport`` through the process's transfer server. Blocks of the host pass through ``device``."""

    name = "jax"

    def __init__(self, server: JaxServer, device: jax.Device, checksums: Checksums):
        self.counters = Counters()
        self._server = server
        self._device: Any = device
        self._checksums = checksums
        self._published: dict[str, list[jax.Array]] = {}
        self._puller: Puller | None = None  # made with the first fetch
        self._closed = False
        self._lock = threading.Lock()

    def endpoint(self) -> dict[str, Any]:
        return self._contract() | {"address": self._server.get().address()}

    def reaches(self, endpoint: Mapping[str, Any]) -> bool:
        contract = self._contract()
        address = endpoint.get("address")
        same = {name: endpoint.get(name) for name in contract} == contract
        return same and isinstance(address, str) and listens(address, PROBE_S)

    def publish(self, key: str, piece: Piece, frames: int, checksum: bool = True) -> dict[str, Any]:
        with self._counted_failures():
            spec = spec_of(piece, frames)
            whole = self._on_device(piece)
            ticket = spec.ticket() | {"address": self._server.get().address(), "uuid": secrets.randbits(63)}
            if checksum:
                ticket["sums"] = sums_of(self._checksums, whole)
            leaves = _cut(whole.reshape(frames, *_frame_shape(spec)))
            with self._lock:
                if self._closed:
                    raise TransferError("this transport is closed")
                if key in self._published:
                    raise TransferError(f"{key} is published already")
                self._published[key] = leaves
            self._server.get().await_pull(ticket["uuid"], leaves)
        self.counters.moved(spec.frames, spec.nbytes)
        return ticket

    def fetch(
        self, endpoint: Mapping[str, Any], ticket: Mapping[str, Any], spec: PieceSpec, where: Where, timeout_s: float
    ) -> jax.Array | None:
        deadline = time.monotonic() + timeout_s
        with self._counted_failures():
            spec.check_ticket(ticket)
            spec.check_where(where)
            address, uuid = endpoint.get("address"), ticket.get("uuid")
            if not isinstance(address, str) or ticket.get("address") != address:
                raise TransferError(f"the ticket is for {ticket.get('address')!r:.50}, but the peer is at {address!r}")
            if type(uuid) is not int or not 0 <= uuid < 2**63:
                raise TransferError(f"{uuid!r:.50} is no id of a published piece")
            device = self._device if isinstance(where, list) else _first_device(where)
            leaves = self._get_puller().pull(address, uuid, _leaf_shapes(spec, device), deadline)
            result = None
            if isinstance(where, list):
                _copy_to_slots(leaves, spec, where)
                verify(ticket, self._checksums, where)
            else:
                whole = jnp.concatenate(leaves).reshape(spec.shape)
                result = jax.device_put(whole, where)
                wait_ready([whole, result], deadline)
                verify(ticket, self._checksums, whole)
        self.counters.moved(spec.frames, spec.nbytes)
        return result

    def release(self, key: str) -> None:
        with self._lock:
            leaves = self._published.pop(key, [])
        for leaf in leaves:
            leaf.delete()  # who pulls it from now on gets an error

    def close(self) -> None:
        with self._lock:
            self._closed = True
            keys, puller = list(self._published), self._puller
        for key in keys:
            self.release(key)
        if puller is not None:
            puller.close()

    def _contract(self) -> dict[str, Any]:
        """What must be the same at both ends."""
        return {"jaxlib": jaxlib.__version__, "platform": self._device.platform, "channels": CHANNELS}

    def _on_device(self, piece: Piece) -> jax.Array:
        """The piece as an array of one device. Host memory is copied: it changes after the release."""
        if isinstance(piece, jax.Array):
            return jax.device_put(piece, _first_device(piece.sharding))
        return jax.device_put(np.stack(list(piece)), self._device)

    def _get_puller(self) -> Puller:
        with self._lock:
            if self._closed:
                raise TransferError("this transport is closed")
            if self._puller is None:
                self._puller = Puller(self._server.get())
            return self._puller

    @contextlib.contextmanager
    def _counted_failures(self) -> Iterator[None]:
        """Count a failure, and make a TransferError of what JAX raises."""
        try:
            yield
        except TransferError:
            self.counters.failed()
            raise
        except (jax.errors.JaxRuntimeError, OSError) as error:
            self.counters.failed()
            raise TransferError(f"the transfer failed: {error}") from error


def _first_device(sharding: jax.sharding.Sharding) -> Any:
    devices: list[Any] = list(sharding.device_set)
    return min(devices, key=lambda device: device.id)


def _frame_shape(spec: PieceSpec) -> tuple[int, ...]:
    """A whole block as it is, since a change of shape costs a copy; parts of blocks flat."""
    return spec.shape[1:] if spec.frames == spec.num_blocks else (spec.num_values // spec.frames,)


def _leaf_shapes(spec: PieceSpec, device: jax.Device) -> list[jax.ShapeDtypeStruct]:
    here = jax.sharding.SingleDeviceSharding(device)
    leaf = jax.ShapeDtypeStruct((1, *_frame_shape(spec)), jnp.dtype(spec.dtype), sharding=here)
    return [leaf] * spec.frames


def _cut(rows: jax.Array) -> list[jax.Array]:
    """Rows [frames, ...] as that many copies [1, ...], so that a release can delete them under a pull.

    Row by row: one small program serves every row, where ``jax.lax.split`` compiles for 15 s for 1024 of them.
    """
    return [jax.lax.dynamic_index_in_dim(rows, np.int32(row)) for row in range(rows.shape[0])]


def _copy_to_slots(leaves: list[jax.Array], spec: PieceSpec, slots: list[np.ndarray]) -> None:
    """Write frame after frame: each lies within one slot, or is several whole ones."""
    per_frame = spec.num_values // spec.frames
    per_block = spec.num_values // spec.num_blocks
    flat = [slot.reshape(-1) for slot in slots]  # views, since a slot is contiguous
    for place, leaf in enumerate(leaves):
        frame, start = np.asarray(leaf).reshape(-1), place * per_frame
        taken = 0
        while taken < per_frame:
            slot, offset = divmod(start + taken, per_block)
            length = min(per_block - offset, per_frame - taken)
            np.copyto(flat[slot][offset : offset + length], frame[taken : taken + length])
            taken += length
