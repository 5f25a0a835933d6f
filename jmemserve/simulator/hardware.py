"""Profiles without a machine: worked out from a model's sizes and a device's numbers, not measured.

A step costs the larger of its arithmetic (two operations per weight and token) and of reading the weights once, plus a
constant; attention costs its own arithmetic per pair of tokens, or the reading of the context. A device reaches a share
of its peak; the shares assumed are ``COMPUTE``, ``MEMORY`` and ``LINK``.
"""

import dataclasses
import json
from pathlib import Path

from jmemserve.config import EngineConfig, demo_folder
from jmemserve.errors import ConfigError
from jmemserve.scheduler.cost_model import Profile
from jmemserve.scheduler.plan import step_shapes

COMPUTE, MEMORY, LINK = 0.5, 0.7, 0.7  # shares of the peak that are assumed to be reached
TENSOR_PARALLEL = 0.85  # of what another device adds
STEP_S = 1e-3  # of a step besides its work: launches, sampling, the host
CALL_S = 2e-3  # of a transfer or swap besides its bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """Published peaks: 16-bit dense operations, memory, link to another device and bus to the host, all per second."""

    flops: float
    memory: float
    link: float
    host: float
    hbm_gb: float


DEVICES = {
    "a100": Device(312e12, 2.0e12, 25e9, 32e9, 80),
    "h100": Device(989e12, 3.35e12, 50e9, 64e9, 80),
    "h200": Device(989e12, 4.8e12, 50e9, 64e9, 141),
    "l40s": Device(362e12, 0.864e12, 25e9, 32e9, 48),
    "v5e": Device(197e12, 0.819e12, 50e9, 16e9, 16),
    "v6e": Device(918e12, 1.64e12, 100e9, 32e9, 32),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """What of a model costs time."""

    name: str
    weights: int  # parameters that every token is multiplied with
    kv_bytes: int  # per token, of all layers, in 16 bits
    attention: int  # layers * query heads * head size


def read_model(path: str) -> Model:
    """From a Hugging Face config.json, or a folder that has one. Raises ConfigError."""
    file = demo_folder() if path == "demo" else Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text())
        hidden, layers, heads = (int(config[k]) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        ffn, vocabulary = int(config["intermediate_size"]), int(config["vocab_size"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        size = int(config.get("head_dim") or hidden // heads)
    except OSError as error:
        raise ConfigError(f"--model {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--model {path}: not the config.json of a decoder: {type(error).__name__} {error}") from None
    if "num_local_experts" in config or "num_experts" in config:
        raise ConfigError(
            f"--model {path}: what a mixture of experts costs is not worked out; calibrate one and use --profile"
        )
    per_layer = hidden * size * (2 * heads + 2 * kv_heads) + 3 * hidden * ffn
    return Model(
        file.parent.name, layers * per_layer + hidden * vocabulary, 4 * layers * kv_heads * size, layers * heads * size
    )


def estimate(model: Model, device: str, devices: int, engine: EngineConfig) -> Profile:
    """The profile of an instance on so many devices. Raises ConfigError if there is no such device."""
    if device not in DEVICES:
        raise ConfigError(f"--hardware {device!r} is not known; the devices are {', '.join(DEVICES)}")
    peak, together = DEVICES[device], 1 + (devices - 1) * TENSOR_PARALLEL
    flops, memory = peak.flops * COMPUTE * together, peak.memory * MEMORY * together
    reading = 2 * model.weights / memory
    steps = []
    for shape in step_shapes(True, True, engine.max_num_seqs, engine.max_num_batched_tokens):
        steps.append((shape.tokens, shape.seqs, STEP_S + max(reading, 2 * model.weights * shape.tokens / flops)))
    block = model.kv_bytes * engine.block_size
    return Profile(
        tuple(steps),
        pair_s=4 * model.attention / flops,
        context_s=model.kv_bytes / memory,
        transfer_call_s=CALL_S,
        transfer_block_s=block / (peak.link * LINK * devices),
        swap_call_s=CALL_S,
        swap_block_s=block / (peak.host * LINK * devices),
        about=f"worked out, not measured: {model.name} on {devices} x {device}, at {COMPUTE:.0%} of peak arithmetic, "
        f"{MEMORY:.0%} of peak memory and {LINK:.0%} of peak links",
    )


def room(model: Model, device: str, devices: int) -> int:
    """Tokens whose keys and values fit beside the weights into nine tenths of the memory. Raises ConfigError."""
    if device not in DEVICES:
        raise ConfigError(f"--hardware {device!r} is not known; the devices are {', '.join(DEVICES)}")
    tokens = int((0.9e9 * DEVICES[device].hbm_gb * devices - 2 * model.weights) / model.kv_bytes)
    if tokens < 1024:
        raise ConfigError(f"{model.name} does not fit into {devices} x {device}; write e.g. colocated:{2 * devices}")
    return tokens
