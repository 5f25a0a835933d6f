"""How the experts of a layer are run on an instance's mesh: by what its devices are good at, each its own experts."""

from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jmemserve.engine.mesh import AXIS
from jmemserve.models.config import ModelConfig
from jmemserve.models.describe import describe_layer
from jmemserve.models.experts import SPAN, Matrices, Routes, all_at_once, by_pairs, in_rounds
from jmemserve.models.moe import by_tiles
from jmemserve.models.ops import Mix


def on_gpu(gate_up: Matrices, down: Matrices, x: jax.Array, routes: Routes) -> jax.Array:
    """A loop of small products would be launches most of all."""
    if _few(gate_up, routes):
        return by_pairs(gate_up, down, x, routes)
    return (all_at_once if x.shape[1] <= SPAN else in_rounds)(gate_up, down, x, routes)


def on_tpu(gate_up: Matrices, down: Matrices, x: jax.Array, routes: Routes) -> jax.Array:
    """A loop costs little, and what it takes of the weights at a time needs no other order in memory."""
    if x.shape[1] <= SPAN and not _few(gate_up, routes):
        return all_at_once(gate_up, down, x, routes)
    return by_tiles(gate_up, down, x, routes, longest=SPAN)


def _few(gate_up: Matrices, routes: Routes) -> bool:
    """Is much less to be read, pair by pair, than all experts?"""
    return 2 * routes.chosen.size <= gate_up.values.shape[0]


FORMS: dict[str, Mix] = {"cpu": by_tiles, "gpu": on_gpu, "tpu": on_tpu}


def mix_of(mesh: Mesh, config: ModelConfig) -> Mix | None:
    """For ``Ops``. Every device has all tokens, and mixes them as far as its experts, or its parts of them, go."""
    form, experts = FORMS.get(mesh.devices.flat[0].platform, on_gpu), config.experts
    if experts is None or (mesh.size == 1 and form is by_tiles):
        return None
    if mesh.size == 1:
        return form
    weights = describe_layer(config, min(experts.layers))

    def specs(name: str) -> Any:
        """In place of each array, how it is divided."""
        found = (weights.get(name), weights.get(f"{name}_scale"))
        given: Any = (None if weight is None else P(*weight.spec(dict(mesh.shape))) for weight in found)
        return Matrices(*given)

    def local(gate_up: Matrices, down: Matrices, x: jax.Array, routes: Routes) -> jax.Array:
        count = gate_up.values.shape[0]
        first = lax.axis_index(AXIS) * count if count < experts.count else 0
        return lax.psum(form(gate_up, down, x, routes.among(first, count)), AXIS)

    given = (specs("experts_gate_up"), specs("experts_down"), P(), P())
    return jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=P(), check_vma=False)
