"""Several processes as one: who they are, and joining them by ``jax.distributed``.

One instance may have a mesh over all devices of all these processes. The process with number 0 is the leader: it runs
the instance. The others are followers: they make the same calls on their own devices (see ``engine/replay.py``). A
process that dies ends all the others; the instance is the unit of failure.
"""

import dataclasses
import os
import sys
import warnings

import jax
import numpy as np
from jax.experimental import multihost_utils

from jmemserve.errors import ConfigError, TransferError
from jmemserve.kvpool.net.frames import Address

JOIN_S = 300  # seconds for all processes to come
LEAVE_S = 20  # seconds for all processes to end
_DETECTED = ("SlurmCluster", "OmpiCluster", "K8sCluster")  # of jax, those that say how many processes there are


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """The processes of one instance, as each of them knows them."""

    coordinator: str  # HOST:PORT at the process 0, the same text everywhere
    num_processes: int
    process_id: int
    detected: bool = False  # told by the environment; jax reads more of it

    @property
    def leads(self) -> bool:
        """Whether this process runs the instance."""
        return self.process_id == 0

    @property
    def host(self) -> str:
        """Where the leader is."""
        return Address.parse(self.coordinator).host

    @property
    def on_one_machine(self) -> bool:
        """The coordinator's address is one that other machines cannot reach."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def local_devices(self, num_devices: int) -> int:
        """How many of ``num_devices`` are of each process. Raises ConfigError if they cannot be shared equally."""
        if num_devices % self.num_processes:
            raise ConfigError(
                f"--mesh needs {num_devices} devices, which {self.num_processes} processes cannot share equally; "
                "make it a multiple"
            )
        return num_devices // self.num_processes


def detect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> World | None:
    """The world that the flags name, else the one that Slurm, Open MPI or Kubernetes started; None: alone.

    Raises ConfigError if only some of the flags are given, or if they contradict each other.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        return _from_environment()
    if given == (None, 1, None):
        return None  # whatever the environment says
    if coordinator is None or num_processes is None or process_id is None:
        raise ConfigError("give all of --coordinator, --num-processes and --process-id, or none of them")
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"--process-id must be from 0 to {num_processes - 1}, not {process_id}")
    try:
        address = Address.parse(coordinator)
    except TransferError as error:
        raise ConfigError(f"--coordinator: {error}") from error
    if not address.host or not address.port:
        raise ConfigError(f"--coordinator must be HOST:PORT of process 0, not {coordinator!r}")
    return World(coordinator, num_processes, process_id) if num_processes > 1 else None


def join(world: World) -> None:
    """Become one of the processes; before anything asks JAX for devices. Raises ConfigError.

    JAX's preemption service is switched off: it would take SIGTERM away from the server.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            None if world.detected else world.coordinator,
            None if world.detected else world.num_processes,
            None if world.detected else world.process_id,
            cluster_detection_method=None if world.detected else "deactivate",  # else Slurm's variables hide devices
            initialization_timeout=JOIN_S,
            shutdown_timeout_seconds=LEAVE_S,
        )
    except RuntimeError as error:
        raise ConfigError(f"process {world.process_id} cannot join at {world.coordinator}: {error}") from error
    if (found := jax.process_count(), jax.process_index()) != (world.num_processes, world.process_id):
        raise ConfigError(f"JAX runs as (processes, number) {found}, and not as {world}")


def leave(code: int = 0) -> None:
    """With code 0, wait for the others to end too, and disconnect; otherwise end this process at once with that code.

    After a failure JAX's own end would wait for processes that wait for this one, and then abort. Ended at once, they
    hear of it by their channel. Without a world nothing happens.
    """
    if not jax.distributed.is_initialized():
        return
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    jax.distributed.shutdown()


def broadcast(data: bytes, size: int) -> bytes:
    """What the leader calls this with, in all processes: ``size`` bytes. It travels as JAX's own data does."""
    box = np.zeros(size, np.uint8)
    box[: len(data)] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(box), np.uint8).tobytes()


def smallest(number: int) -> int:
    """The smallest of the numbers that all processes call this with."""
    if jax.process_count() == 1:
        return number
    return int(np.min(multihost_utils.process_allgather(np.int32(min(number, np.iinfo(np.int32).max)))))


def _from_environment() -> World | None:
    """What JAX would find by itself. Where it cannot be asked there is nothing."""
    try:
        from jax._src.clusters import ClusterEnv
    except ImportError:  # not public; flags do without it
        return None
    for kind in ClusterEnv._cluster_types:
        if kind.__name__ in _DETECTED and _is_present(kind):
            try:
                if (number := kind.get_process_count()) < 2:
                    return None  # one task of a batch job, one pod: no other process is meant to join
                address = kind.get_coordinator_address(timeout_secs=JOIN_S, override_coordinator_port=None)
                return World(address, number, kind.get_process_id(), detected=True)
            except (RuntimeError, KeyError, ValueError):  # such as a pod that is of no job
                return None
    return None


def _is_present(kind) -> bool:
    """Whether the environment is of this kind; JAX warns where a package is missing to find out, and that is a no."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return kind.is_env_present()
        except Exception:  # Kubernetes' package raises its own
            return False
