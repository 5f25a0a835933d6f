"""What the GPU does for the kernels, and what stands for it in JAX's interpreter.

Up to Ada, copies are by cp.async, and a thread waits until no more than so many of its own are under way. From Hopper
on they are by TMA, which tells a barrier, of which each slot has one; Pallas has no others there.

JAX's interpreter knows neither mma nor cp.async. There a product is ``jnp.dot``, and copies tell barriers: that the
kernels wait before they read is seen there too, but not that the number of copies still under way is the right one.
"""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def copy(source, target, arrived) -> None:
    """Begin to bring ``source`` (global memory) to ``target`` (shared memory); ``arrived``: see ``barriers``."""
    for barrier in arrived:
        plgpu.commit_smem()  # these copies need it after reads of the target; cp.async only the barrier before it
        plgpu.copy_gmem_to_smem(source, target, barrier)
        return
    plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def wait(arrived, later: int) -> None:
    """Until all copies but the ``later`` last ones are there; ``arrived``: of the slot that they went to."""
    for barrier in arrived:
        plgpu.barrier_wait(barrier)
        return
    plgpu.wait_gmem_to_smem(later)


def barriers(plan, copies: int, slots: int) -> list:
    """Scratch that ``arrived`` is a slot of: one barrier each for ``copies`` copies, or nothing."""
    return [plgpu.Barrier(num_arrivals=copies, num_barriers=slots)] if plan.barriers else []


def product(plan, left, right, start):
    """start (f32 [rows, m]) + left [rows, n] times right [n, m], which both are in shared memory."""
    if plan.interpret:
        return start + jnp.dot(left[...], right[...], preferred_element_type=jnp.float32)
    left = plgpu.load(left, layout=plgpu.Layout.MMA_LHS(plan.dtype, m_warps=plan.row_warps))
    right = plgpu.load(right, layout=plgpu.Layout.MMA_RHS(plan.dtype, m_warps=plan.row_warps))
    return plgpu.mma(start, left, right)


def store(target, value) -> None:
    """Put registers into global memory, in whatever pieces their layout has."""
    if hasattr(plgpu, "store"):  # jax 0.12; before, there was no other way than this
        plgpu.store(target, value, optimized=False)
    else:
        target[...] = value
