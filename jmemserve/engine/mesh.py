"""Devices: which there are, and the mesh of one instance."""

import os

import jax
import numpy as np
from jax.sharding import Mesh

from jmemserve.config import ClusterSpec, InstanceSpec
from jmemserve.errors import ConfigError

AXIS = "model"  # the one axis of an instance's mesh: tensor parallelism


def describe_devices(spec: ClusterSpec) -> list[str]:
    """One line per instance: which devices it has. Raises ConfigError when there are too few."""
    devices = jax.devices()
    lines = []
    for instance in spec.instances:
        mesh = make_mesh(instance, spec.num_devices)
        names = ", ".join(f"{device.platform}:{device.id}" for device in mesh.devices.flat)
        lines.append(f"{instance.name:<12} {instance.role.value:<10} model={instance.model_axis}  [{names}]")
    left = len(devices) - spec.num_devices
    return [*lines, f"{len(devices)} {devices[0].device_kind} devices" + (f", {left} of them unused" if left else "")]


def make_mesh(spec: InstanceSpec, num_needed: int) -> Mesh:
    """The mesh of one instance. Raises ConfigError when the devices do not suffice for the whole cluster."""
    devices = jax.devices()
    if len(devices) < num_needed:
        raise ConfigError(
            f"--mesh needs {num_needed} devices, but this machine has {len(devices)} ({devices[0].device_kind}); "
            "ask for fewer instances or smaller axes"
            + (" (or a new process: JAX has started with these)" if devices[0].platform == "cpu" else "")
        )
    chosen = [devices[index] for index in spec.device_indices]
    if jax.process_count() > 1 and len(chosen) != len(devices):
        raise ConfigError(
            f"{spec.name} has {len(chosen)} of {len(devices)} devices, but in several processes one instance must have "
            f"them all; use --mesh {spec.role.value}:model={len(devices)}"
        )
    return Mesh(np.array(chosen), (AXIS,))


def device_memory(mesh: Mesh) -> tuple[int, int]:
    """Bytes of one device of the mesh: (in all, in use). CPU devices share this machine's memory equally."""
    device = mesh.local_devices[0]  # of other processes nothing can be asked
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"], stats["bytes_in_use"]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total // max(1, len(jax.local_devices())), 0
