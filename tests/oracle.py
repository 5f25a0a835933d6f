"""Slow truths: a model by full recompute, without pages, batches or caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jmemserve.kernels.rule import Rule
from jmemserve.models import ModelConfig
from jmemserve.models.ops import Ops


def model_mesh(size: int = 1) -> Mesh:
    """The first devices as a mesh with the axis "model"."""
    return Mesh(np.array(jax.devices()[:size]), ("model",))


def dense_attend(cache, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule):
    """Causal attention of a whole sequence to itself; the cache is handed through."""
    num, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(num, kv_heads, heads // kv_heads, head_dim).astype(jnp.float32) * rule.scale
    scores = jnp.einsum("tkgh,skh->kgts", grouped, k.astype(jnp.float32), precision="highest")
    if rule.soft_cap is not None:
        scores = rule.soft_cap * jnp.tanh(scores / rule.soft_cap)
    place = jnp.arange(num)
    seen = place[None] <= place[:, None]
    if rule.window is not None:
        seen &= place[None] > place[:, None] - rule.window
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("kgts,skh->tkgh", weights, v.astype(jnp.float32), precision="highest")
    return out.reshape(q.shape).astype(q.dtype), cache


@functools.cache
def _forward(graph: nnx.GraphDef, length: int):
    @jax.jit
    def run(state, tokens):
        model = nnx.merge(graph, state)
        hidden, _ = model(tokens, jnp.arange(length), None, Ops(dense_attend))
        return model.logits(hidden)

    return run


def naive_logits(graph: nnx.GraphDef, state: nnx.State, tokens: list[int]) -> np.ndarray:
    """f32[T, V]: logits after every token of a sequence."""
    length = -(-len(tokens) // 32) * 32  # few lengths, few compilations; what comes after a token does not matter
    padded = jnp.asarray(tokens + [0] * (length - len(tokens)))
    return np.asarray(_forward(graph, length)(state, padded)).T[: len(tokens)]


def naive_generate(graph: nnx.GraphDef, state: nnx.State, config: ModelConfig, prompt: list[int], n: int) -> list[int]:
    """Greedy continuation by n tokens."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(naive_logits(graph, state, tokens)[-1].argmax()))
    return tokens[len(prompt) :]
