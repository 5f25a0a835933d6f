"""The decoder that every family shares, in Flax NNX. It knows nothing of pages: attention is handed in.

Activations are columns, [features, tokens], so that a weight, stored [out, in], is the left operand of every product:
for the few columns of decoding, XLA on CPU is then up to three times faster. On a GPU columns lie in memory one after
the other (``ops.project_to_rows``), so that it works on rows all the same.
Queries, keys and values share one product, and so do the two inner halves of the feed-forward layer.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jmemserve.models.config import ModelConfig
from jmemserve.models.describe import Weight, describe_layer, describe_top
from jmemserve.models.experts import Matrices
from jmemserve.models.moe import mixture
from jmemserve.models.ops import Cache, Ops, Project, project
from jmemserve.models.rope import RopeConfig

MakeParam = Callable[[str, Weight], nnx.Param]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}


def rms_norm(config: ModelConfig, weight: jax.Array, x: jax.Array, axis: int = 0) -> jax.Array:
    """Scale x to a root mean square of 1 along ``axis``, in float32, then by ``weight``, which broadcasts to x."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=axis, keepdims=True) + config.norm_eps)
    return ((weight.astype(jnp.float32) + config.norm_offset) * scaled).astype(x.dtype)


def rope_angles(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [turned / 2, T] of every position (i32[T]), in float32."""
    angles = rope.frequencies(head_dim)[:, None] * positions.astype(jnp.float32)[None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.amplitude != 1:
        cos, sin = rope.amplitude * cos, rope.amplitude * sin
    # Else XLA makes them anew in every layer, for every head.
    return jax.lax.optimization_barrier((cos, sin))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate halves of what is turned of x [K, n, H, T]: its first part, with cos and sin [turned / 2, T]."""
    half = cos.shape[0]
    halves = x[:, :, : 2 * half].astype(jnp.float32).reshape(*x.shape[:2], 2, half, -1)
    # Halves that change places, not slices and a concatenation: XLA makes one loop of it, with what is around it.
    turned = halves * cos[None, None, None] + halves[:, :, ::-1] * jnp.stack((-sin, sin))[None, None]
    turned = turned.reshape(*x.shape[:2], 2 * half, -1).astype(x.dtype)
    return turned if 2 * half == x.shape[2] else jnp.concatenate((turned, x[:, :, 2 * half :]), axis=2)


class Layer(nnx.Module):
    """Attention and feed-forward, each added to the stream. A quantized weight has its scales beside it: qkv_scale."""

    attention_norm: nnx.Param
    qkv: nnx.Param
    qkv_bias: nnx.Param  # if attention_bias
    q_norm: nnx.Param  # if qk_norm
    k_norm: nnx.Param  # if qk_norm
    out: nnx.Param
    attention_out_norm: nnx.Param  # if out_norms
    feed_forward_norm: nnx.Param
    gate_up: nnx.Param
    down: nnx.Param
    feed_forward_out_norm: nnx.Param  # if out_norms
    router: nnx.Param  # these three in place of the two before, where there are experts
    experts_gate_up: nnx.Param
    experts_down: nnx.Param

    def __init__(self, config: ModelConfig, index: int, make: MakeParam):
        self.config, self.index = config, index
        for name, weight in describe_layer(config, index).items():
            setattr(self, name, make(f"layers.{index}.{name}", weight))

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, cache: Cache, ops: Ops):
        with jax.named_scope("attention"):
            out, cache = self._attention(x, cos, sin, cache, ops)
            if self.config.out_norms:
                out = rms_norm(self.config, self.attention_out_norm[...][:, None], out)
        x = x + out
        with jax.named_scope("feed_forward"):
            out = self._feed_forward(x, ops)
            if self.config.out_norms:
                out = rms_norm(self.config, self.feed_forward_out_norm[...][:, None], out)
        return x + out, cache

    def _attention(self, x: jax.Array, cos: jax.Array, sin: jax.Array, cache: Cache, ops: Ops):
        c, t = self.config, x.shape[1]
        group, heads = c.group, c.head_dim
        normed = rms_norm(c, self.attention_norm[...][:, None], x)
        qkv = self._product("qkv", normed, ops).astype(x.dtype)
        qkv = qkv.reshape(c.num_kv_heads, group + 2, heads, t)  # K G+2 H T
        if c.attention_bias:
            qkv = qkv + self.qkv_bias[...][..., None].astype(qkv.dtype)
        qk, v = qkv[:, : group + 1], qkv[:, group + 1]
        if c.qk_norm:
            own = jnp.concatenate((jnp.broadcast_to(self.q_norm[...], (group, heads)), self.k_norm[...][None]))
            qk = rms_norm(c, own[None, ..., None], qk, axis=2)
        q, k, v = ops.turned((rotate(qk[:, :group], cos, sin), rotate(qk[:, group:], cos, sin), v))
        q = q.transpose(3, 0, 1, 2).reshape(t, c.num_heads, heads)  # T N H
        k, v = k[:, 0].transpose(2, 0, 1), v.transpose(2, 0, 1)  # T K H
        out, cache = ops.attend(cache, self.index, q, k, v, c.rule(self.index))
        return self._product("out", out.reshape(t, -1).T, ops).astype(x.dtype), cache

    def _product(self, name: str, x: jax.Array, ops: Ops) -> jax.Array:
        """Of a weight [..., in] with x [in, T]: f32[out, T]."""
        out, scale = ops.project(getattr(self, name)[...].reshape(-1, x.shape[0]), x), self._scale(name)
        return out if scale is None else out * scale.reshape(-1, 1)

    def _scale(self, name: str) -> jax.Array | None:
        """Of a weight's rows, if it is quantized."""
        param = getattr(self, f"{name}_scale", None)
        return None if param is None else param[...]

    def _feed_forward(self, x: jax.Array, ops: Ops) -> jax.Array:
        c, t = self.config, x.shape[1]
        normed = rms_norm(c, self.feed_forward_norm[...][:, None], x)
        if c.experts is not None and self.index in c.experts.layers:
            inner = Matrices(self.experts_gate_up[...], self._scale("experts_gate_up"))
            outer = Matrices(self.experts_down[...], self._scale("experts_down"))
            return mixture(c.experts, self.router[...], inner, outer, normed, ops)
        both = self._product("gate_up", normed, ops).astype(x.dtype).reshape(c.intermediate_size, 2, t)
        return self._product("down", ACTIVATIONS[c.activation](both[:, 0]) * both[:, 1], ops).astype(x.dtype)


class Decoder(nnx.Module):
    """Tokens in, hidden columns out; ``logits`` of the columns that are wanted."""

    embed: nnx.Param
    norm: nnx.Param
    lm_head: nnx.Param  # if the embeddings are not tied

    def __init__(self, config: ModelConfig, make: MakeParam):
        self.config = config
        for name, weight in describe_top(config).items():
            setattr(self, name, make(name, weight))
        self.layers = nnx.List([Layer(config, index, make) for index in range(config.num_layers)])

    def __call__(self, tokens: jax.Array, positions: jax.Array, cache: Cache, ops: Ops):
        """tokens, positions: i32[T]; returns (hidden [D, T], cache)."""
        c = self.config
        with jax.named_scope("embed"):
            x = self.embed[...][tokens].T  # D T
            if c.scaled_embeddings:
                x = x * jnp.asarray(c.hidden_size**0.5, x.dtype)  # rounded to the type, as it was in training
        angles = rope_angles(c.rope, c.head_dim, positions)
        local = angles if c.local_rope is None else rope_angles(c.local_rope, c.head_dim, positions)
        for layer, window in zip(self.layers, c.windows, strict=True):
            x, cache = layer(x, *(angles if window is None else local), cache, ops)
        return x, cache

    def logits(self, hidden: jax.Array, project: Project = project) -> jax.Array:
        """hidden [D, B] -> f32 [V, B]."""
        c = self.config
        with jax.named_scope("logits"):
            normed = rms_norm(c, self.norm[...][:, None], hidden)
            logits = project((self.embed if c.tied_embeddings else self.lm_head)[...], normed)
            return logits if c.logit_soft_cap is None else c.logit_soft_cap * jnp.tanh(logits / c.logit_soft_cap)
