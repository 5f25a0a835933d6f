"""What must be settled before JAX's backend starts: virtual CPU devices, and a guard for older releases."""

import os

import jax


def arrange_cpu_devices(count: int) -> None:
    """Make JAX's CPU backend have at least ``count`` devices, if it has not been started yet.

    Other backends are not changed: an accelerator's devices are what they are. Must run before anything asks JAX
    for devices; afterwards it does nothing, and a mesh that does not fit is refused when it is made.
    """
    _guard_old_cpu_backends()
    asked_by_hand = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if asked_by_hand or jax.config.jax_num_cpu_devices >= count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backend runs already
        pass


def _guard_old_cpu_backends() -> None:
    """Below 0.12, XLA's fused reductions on CPU can give wrong numbers without a word (jax-ml/jax#39103): no fusion.

    The engine checks its arithmetic at start as well, should the backend run already.
    """
    flags, name = os.environ.get("XLA_FLAGS", ""), "xla_cpu_experimental_ynn_fusion_type"
    if jax.__version_info__ < (0, 12) and name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{name}=-reduce".strip()
