"""What a model leaves to others: how to attend, how to multiply a weight with columns, and how to mix experts."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jmemserve.kernels.rule import Rule
from jmemserve.models.experts import Matrices, Routes

Cache = TypeVar("Cache")
# (cache, layer, q [T, N, H], k [T, K, H], v [T, K, H], rule) -> (out [T, N, H], cache)
Attend = Callable[[Cache, int, jax.Array, jax.Array, jax.Array, Rule], tuple[jax.Array, Cache]]
Project = Callable[[jax.Array, jax.Array], jax.Array]  # ([out, in], [in, T]) -> f32[out, T]
ProjectFirst = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # the same, of the first so many (i32[]) columns
# (gate_up [E, F, 2, D], down [E, D, F], x [D, T], routes) -> f32[D, T]
Mix = Callable[[Matrices, Matrices, jax.Array, Routes], jax.Array]


def project(weight: jax.Array, x: jax.Array) -> jax.Array:
    """[out, in] x [in, T] -> f32[out, T], summed in float32. A quantized weight takes the columns' type, exactly."""
    return jnp.einsum("nk,kt->nt", weight.astype(x.dtype), x, preferred_element_type=jnp.float32)


def project_to_rows(weight: jax.Array, x: jax.Array) -> jax.Array:
    """The same for GPUs: in memory each column of the result is one piece, and so is what is made of it.

    Then a norm is one kernel that many multiprocessors share, and attention gets its queries without a transposition.
    """
    return with_layout_constraint(project(weight, x), Layout(major_to_minor=(1, 0)))


def apart[Arrays](arrays: Arrays) -> Arrays:
    """The same arrays, made before anybody looks at them.

    A transposition for itself is ten times as quick on a CPU as one that XLA fuses with what makes its operand.
    """
    return jax.lax.optimization_barrier(arrays)


def project_first(weight: jax.Array, x: jax.Array, used: jax.Array) -> jax.Array:
    """The same; of the columns behind ``used`` nobody wants to know."""
    return project(weight, x)


@dataclasses.dataclass(frozen=True, slots=True)
class Ops:
    """Of one step. ``project`` is for columns that are the step's tokens; ``turned`` gets what is transposed next."""

    attend: Attend
    project: Project = project
    project_first: ProjectFirst = project_first
    mix: Mix | None = None  # of experts; None: as CPUs do it (moe.py), with ``project_first``
    used: jax.Array | None = None  # i32[]: tokens of the step, of which those behind are padding; None: all
    turned: Callable[[Any], Any] = lambda arrays: arrays


# What is said to XLA by the platform of the devices.
HINTS: dict[str, dict[str, Any]] = {"cpu": {"turned": apart}, "gpu": {"project": project_to_rows}}
