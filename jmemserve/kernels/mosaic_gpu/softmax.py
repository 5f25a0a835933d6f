"""The softmax that goes over spans of scores, in float32 registers.

Products of queries and keys become exponents of 2 by one multiplication, which is put off until the top is subtracted:
then both are one instruction. Only a soft cap needs the scores themselves.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels.mosaic_gpu.plan import Tiling

NEVER = -1e30  # a score that is never seen; finite, so that rows that see nothing stay finite
SOME = -1e20  # log2 of a sum of exponentials is above that if there is anything in it
_LOG2E = math.log2(math.e)


def nothing_yet(plan: Tiling):
    """Before any key: (mixed values [rows, columns] of each part of a head, top score [rows], mass [rows]), all f32."""
    mixed = tuple(plgpu.layout_cast(jnp.zeros((plan.rows, part.size), jnp.float32), plan.layout) for part in plan.parts)
    per_row = plan.layout.reduce(1)
    top = plgpu.layout_cast(jnp.full((plan.rows,), NEVER, jnp.float32), per_row)
    return mixed, top, plgpu.layout_cast(jnp.zeros((plan.rows,), jnp.float32), per_row)


def unit(plan: Tiling) -> float:
    """What a score is multiplied with to be an exponent of 2."""
    return plan.rule.scale * _LOG2E if plan.rule.soft_cap is None else 1.0


def weigh(plan: Tiling, products, chunk, limit, top, mass, masked: bool):
    """The weights f32[rows, span] of span ``chunk``, given products of queries and keys of that shape.

    limit: i32[rows], the last place that each query sees, -1 for none; where all see the whole span, it need not be
    ``masked``. top (in scores), mass: so far.
    -> (weights, what to multiply the values mixed so far with, new top, new mass)
    """
    rule, shape, scores = plan.rule, (plan.rows, plan.span), products
    if rule.soft_cap is not None:
        cap = rule.soft_cap * _LOG2E
        # The GPU's own tanh is good to 2**-11, which is a percent of a weight; its exp2 to 2**-22.
        scores = cap - 2 * cap / (jnp.exp2(products * (2 * rule.scale * _LOG2E / rule.soft_cap)) + 1)
    seen = None
    if masked:
        place = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plan.layout) + chunk * plan.span
        furthest = lax.broadcast_in_dim(limit, shape, [0])
        seen = place <= furthest
        if rule.window is not None:
            seen = seen & (place > furthest - rule.window)
        scores = jnp.where(seen, scores, NEVER)
    new_top = jnp.maximum(top, scores.max(axis=1))
    weights = jnp.exp2(scores * unit(plan) - lax.broadcast_in_dim(new_top * unit(plan), shape, [0]))
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    keep = jnp.exp2((top - new_top) * unit(plan))
    return weights, keep, new_top, mass * keep + weights.sum(axis=1)


def scaled(mixed, by):
    """[rows, columns] times [rows]."""
    return mixed * lax.broadcast_in_dim(by, mixed.shape, [0])


def clean(values, layout, first, low, high) -> None:
    """Zero the values (in shared memory, [n, H]: those of places ``first`` on) of places outside of low to high.

    layout: of registers, in which they go through them.
    """
    shape = values.shape
    at = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + first
    kept = plgpu.layout_cast(values[...], layout)
    values[...] = jnp.where((at >= low) & (at < high), kept, jnp.zeros(shape, values.dtype))


def finish(plan: Tiling, state):
    """-> (outputs f32 [rows, columns] of each part of a head, log2 of the sum of exponentials [rows]).

    The latter is below ``SOME`` where nothing is seen.
    """
    mixed, top, mass = state
    mass = jnp.maximum(mass, 1e-30)
    return tuple(held / lax.broadcast_in_dim(mass, held.shape, [0]) for held in mixed), top * unit(plan) + jnp.log2(
        mass
    )
