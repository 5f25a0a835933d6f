"""Every weight, described once: shape, logical axes, and where a Hugging Face checkpoint keeps it.

Making, sharding, loading, saving and counting are all derived from this. A fused weight names several tensors; each
fills the part of it that ``place`` says.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from jmemserve.errors import ConfigError
from jmemserve.models.config import Experts, ModelConfig

# Logical axis -> mesh axis. What is not here is on every device in full.
MESH_AXES = {"kv_heads": "model", "ffn": "model", "vocab": "model", "experts": "model"}
ONLY_EVENLY = frozenset({"vocab", "experts"})  # sharded only where the size divides evenly

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint tensor that fills a weight, or a part of one; or some of its rows, if the checkpoint fuses tensors.

    ``shape`` is the tensor's own, or that of these rows. ``split`` is the same with its axes split so that it matches
    ``part`` of the weight axis by axis; a missing axis of ``part`` (an integer there) does not appear in ``split``.
    """

    name: str
    shape: tuple[int, ...]
    split: tuple[int, ...]
    part: tuple[int | slice, ...]
    first_row: int = 0
    all_rows: int | None = None  # of a fused tensor

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return (self.all_rows or self.shape[0], *self.shape[1:])


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """One array of the model."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical, one per dimension
    sources: tuple[Source, ...]
    init: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] | None = None  # None: ones
    inputs: int = 0  # trailing axes that a product sums over, if the weight may be quantized
    dtype: str | None = None  # None: the model's

    def spec(self, sizes: dict[str, int]) -> tuple[str | None, ...]:
        """Mesh axis per dimension for a mesh with these axis sizes: each for the first dimension that may have it.

        Raises ConfigError if it does not divide.
        """
        out: list[str | None] = []
        for size, axis in zip(self.shape, self.axes, strict=True):
            mesh_axis = MESH_AXES.get(axis or "")
            if mesh_axis in out:
                mesh_axis = None
            parts = sizes.get(mesh_axis or "", 1)
            if size % parts:
                if axis not in ONLY_EVENLY:
                    raise ConfigError(
                        f"the model has {size} {axis}, which do not divide evenly over model={parts}; "
                        f"choose a size of the mesh axis that divides {size}"
                    )
                mesh_axis = None
            out.append(mesh_axis if parts > 1 else None)
        return tuple(out)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, np.float32) * np.float32(0.02)


def _plain(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], init=_normal, inputs: int = 0) -> Weight:
    """A weight that is one tensor of the checkpoint as it is."""
    return Weight(shape, axes, (Source(name, shape, shape, (slice(None),) * len(shape)),), init, inputs)


def _rounded(weights: dict[str, Weight], dtype: str) -> dict[str, Weight]:
    """The same weights, those of products in ``dtype``, each with its scales behind it."""
    found: dict[str, Weight] = {}
    for name, weight in weights.items():
        if not weight.inputs:
            found[name] = weight
            continue
        found[name] = dataclasses.replace(weight, dtype=dtype)
        outer = len(weight.shape) - weight.inputs
        sources = tuple(
            dataclasses.replace(
                source,
                name=f"{source.name}_scale",
                shape=(source.shape[0], 1),
                split=(*source.split[: -weight.inputs], 1),
                part=(*source.part[:outer], slice(None)),
            )
            for source in weight.sources
        )
        shape, axes = (*weight.shape[:outer], 1), (*weight.axes[:outer], None)
        found[f"{name}_scale"] = Weight(shape, axes, sources, dtype="float32")
    return found


def _fuse(name: str, sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """The same sources as rows of one tensor, one after the other."""
    rows = [source.shape[0] for source in sources]
    return tuple(
        dataclasses.replace(source, name=name, first_row=sum(rows[:place]), all_rows=sum(rows))
        for place, source in enumerate(sources)
    )


def describe_top(config: ModelConfig) -> dict[str, Weight]:
    """The weights outside the layers, by attribute of Decoder."""
    table, prefix = (config.vocab_size, config.hidden_size), config.tensor_prefix
    weights = {
        "embed": _plain(f"{prefix}model.embed_tokens.weight", table, ("vocab", None)),
        "norm": _plain(f"{prefix}model.norm.weight", (config.hidden_size,), (None,), init=None),
    }
    if not config.tied_embeddings:
        weights["lm_head"] = _plain(f"{prefix}lm_head.weight", table, ("vocab", None))
    return weights


def describe_layer(config: ModelConfig, index: int) -> dict[str, Weight]:
    """The weights of one layer, by attribute of Layer."""
    c = config
    d, k, g, h, f = c.hidden_size, c.num_kv_heads, c.group, c.head_dim, c.intermediate_size
    base = f"{c.tensor_prefix}model.layers.{index}"
    every = slice(None)

    def heads(kind: str, rest: tuple[int, ...], suffix: str, tail: tuple[slice, ...]) -> tuple[Source, ...]:
        """q, k and v of ``kind``: for each kv head its group of queries, its key, its value."""
        return (
            Source(
                f"{base}.self_attn.q_proj.{suffix}",
                (k * g * h, *rest),
                (k, g, h, *rest),
                (every, slice(0, g), every, *tail),
            ),
            Source(f"{base}.self_attn.k_proj.{suffix}", (k * h, *rest), (k, h, *rest), (every, g, every, *tail)),
            Source(f"{base}.self_attn.v_proj.{suffix}", (k * h, *rest), (k, h, *rest), (every, g + 1, every, *tail)),
        )

    qkv = heads("qkv", (d,), "weight", (every,))
    gate_up: tuple[Source, ...] = (
        Source(f"{base}.mlp.gate_proj.weight", (f, d), (f, d), (every, 0, every)),
        Source(f"{base}.mlp.up_proj.weight", (f, d), (f, d), (every, 1, every)),
    )
    if c.fused_tensors:
        qkv = _fuse(f"{base}.self_attn.qkv_proj.weight", qkv)
        gate_up = _fuse(f"{base}.mlp.gate_up_proj.weight", gate_up)
    weights = {
        "attention_norm": _plain(f"{base}.input_layernorm.weight", (d,), (None,), init=None),
        "qkv": Weight((k, g + 2, h, d), ("kv_heads", None, None, None), qkv, _normal, inputs=1),
        "out": Weight(
            (d, k, g, h),
            (None, "kv_heads", None, None),
            (Source(f"{base}.self_attn.o_proj.weight", (d, k * g * h), (d, k, g, h), (every,) * 4),),
            _normal,
            inputs=3,
        ),
        "feed_forward_norm": _plain(f"{base}.post_attention_layernorm.weight", (d,), (None,), init=None),
        "gate_up": Weight((f, 2, d), ("ffn", None, None), gate_up, _normal, inputs=1),
        "down": _plain(f"{base}.mlp.down_proj.weight", (d, f), (None, "ffn"), inputs=1),
    }
    if c.experts is not None and index in c.experts.layers:
        del weights["gate_up"], weights["down"]
        weights |= _experts(c, c.experts, base)
    if c.attention_bias:
        weights["qkv_bias"] = Weight((k, g + 2, h), ("kv_heads", None, None), heads("bias", (), "bias", ()), _normal)
    if c.qk_norm:
        weights["q_norm"] = _plain(f"{base}.self_attn.q_norm.weight", (h,), (None,), init=None)
        weights["k_norm"] = _plain(f"{base}.self_attn.k_norm.weight", (h,), (None,), init=None)
    if c.out_norms:
        names = {
            "attention_out_norm": "post_attention",
            "feed_forward_norm": "pre_feedforward",
            "feed_forward_out_norm": "post_feedforward",
        }
        weights |= {
            ours: _plain(f"{base}.{name}_layernorm.weight", (d,), (None,), init=None) for ours, name in names.items()
        }
    return weights if c.quantized is None else _rounded(weights, c.quantized.dtype)


def _experts(config: ModelConfig, experts: Experts, base: str) -> dict[str, Weight]:
    """The router and every expert's inner and outer half.

    Each device has whole experts, or where their number does not divide evenly, its part of all."""
    d, f, e = config.hidden_size, config.expert_size, experts.count
    router, gate, up, down = (f"{base}.{name}.weight" for name in experts.names)
    every = slice(None)
    halves = [
        Source(name.format(expert), (f, d), (f, d), (expert, every, half, every))
        for expert in range(e)
        for half, name in enumerate((gate, up))
    ]
    outer = [Source(down.format(expert), (d, f), (d, f), (expert, every, every)) for expert in range(e)]
    return {
        "router": _plain(router, (e, d), (None, None)),
        "experts_gate_up": Weight((e, f, 2, d), ("experts", "ffn", None, None), tuple(halves), _normal, inputs=1),
        "experts_down": Weight((e, d, f), ("experts", None, "ffn"), tuple(outer), _normal, inputs=1),
    }


def describe(config: ModelConfig) -> dict[str, Weight]:
    """Every weight of the model by its path, for example ``layers.3.qkv``."""
    weights = describe_top(config)
    for index in range(config.num_layers):
        weights |= {f"layers.{index}.{name}": weight for name, weight in describe_layer(config, index).items()}
    return weights
