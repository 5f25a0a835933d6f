"""Virtual CPU devices, so that a mesh of several devices runs anywhere."""

import os

import jax


def arrange_cpu_devices(count: int) -> None:
    """Make JAX's CPU backend have at least ``count`` devices, if it has not been started yet.

    Other backends are not changed: an accelerator's devices are what they are. Must run before anything asks JAX
    for devices; afterwards it does nothing, and a mesh that does not fit is refused when it is made.
    """
    asked_by_hand = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if asked_by_hand or jax.config.jax_num_cpu_devices >= count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backend runs already
        pass
