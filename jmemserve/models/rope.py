"""Rotary position embedding: which frequencies a config.json asks for."""

import dataclasses
from typing import Any

import numpy as np

from jmemserve.errors import ConfigError
from jmemserve.models.fields import take_count, take_positive

KINDS = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True, slots=True)
class RopeConfig:
    """Angles are position * theta ** (-2 i / head_dim), the frequencies being scaled by kind."""

    theta: float = 10000.0
    kind: str = "default"  # one of KINDS
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3; above low_freq_factor
    original_max_len: int = 8192  # llama3

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position, f32[H/2]; reckoned in float64, so that they are the same on every device."""
        plain = self.theta ** (-np.arange(0, head_dim, 2) / head_dim)
        if self.kind == "linear":
            return (plain / self.factor).astype(np.float32)
        if self.kind == "llama3":
            turns = self.original_max_len * plain / (2 * np.pi)  # over the original context
            slow, fast = self.low_freq_factor, self.high_freq_factor
            share = np.clip((turns - slow) / (fast - slow), 0, 1)  # 0: stretch fully, 1: leave alone
            plain = plain * (share + (1 - share) / self.factor)
        return plain.astype(np.float32)


def take_rope(raw: dict[str, Any]) -> RopeConfig:
    """From rope_theta and rope_scaling, or from the newer rope_parameters. Raises ConfigError for other kinds."""
    fields: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.pop(key, None)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{key} must be an object, not {value!r}")
        fields |= {name: item for name, item in (value or {}).items() if item is not None}
    outer = take_positive(raw, "rope_theta", 10000.0)
    theta = take_positive(fields, "rope_theta", outer)
    for place in (raw, fields):
        if (share := take_positive(place, "partial_rotary_factor", 1.0)) != 1:
            raise ConfigError(f"partial_rotary_factor {share} is not supported; only 1 is")
    older = fields.pop("type", "default")
    kind = fields.pop("rope_type", older)
    if kind not in KINDS:
        raise ConfigError(f"rope scaling of type {kind!r} is not supported; supported are {', '.join(KINDS)}")
    try:
        rope = _scaled(kind, theta, fields)
    except ConfigError as error:
        raise ConfigError(f"rope scaling of type {kind!r}: {error}") from None
    if fields:
        raise ConfigError(f"rope scaling of type {kind!r} has unknown fields {fields}")
    return rope


def _scaled(kind: str, theta: float, fields: dict[str, Any]) -> RopeConfig:
    if kind == "default":
        return RopeConfig(theta)
    factor = take_positive(fields, "factor")
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    low, high = take_positive(fields, "low_freq_factor"), take_positive(fields, "high_freq_factor")
    if low >= high:
        raise ConfigError(f"low_freq_factor ({low}) must be below high_freq_factor ({high})")
    return RopeConfig(theta, kind, factor, low, high, take_count(fields, "original_max_position_embeddings"))
