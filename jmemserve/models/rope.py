"""Rotary position embedding: which frequencies a config.json asks for."""

import dataclasses
import math
from typing import Any

import numpy as np

from jmemserve.errors import ConfigError
from jmemserve.models.fields import take_count, take_positive

KINDS = ("default", "linear", "llama3", "longrope")


@dataclasses.dataclass(frozen=True, slots=True)
class RopeConfig:
    """Angles are position * theta ** (-2 i / head_dim), the frequencies being scaled by kind."""

    theta: float = 10000.0
    kind: str = "default"  # one of KINDS
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3; above low_freq_factor
    original_max_len: int = 8192  # llama3, longrope
    share: float = 1.0  # of each head that is turned; the rest is left as it is
    factors: tuple[float, ...] = ()  # longrope: by which each frequency is divided
    short_factors: tuple[float, ...] = ()  # longrope: the same where no sequence is longer than the original context
    amplitude: float = 1.0  # longrope: of cosines and sines

    def turned(self, head_dim: int) -> int:
        """How many of a head's values are turned: the first ones. Even."""
        return int(head_dim * self.share)

    def check(self, head_dim: int) -> None:
        """Raise ConfigError for what does not suit heads of that size."""
        turned = self.turned(head_dim)
        if not 2 <= turned <= head_dim or turned % 2:
            raise ConfigError(
                f"partial_rotary_factor {self.share} turns {turned} of {head_dim} values, not an even part"
            )
        for name, factors in (("long_factor", self.factors), ("short_factor", self.short_factors)):
            if self.kind == "longrope" and len(factors) != turned // 2:
                raise ConfigError(
                    f"rope scaling of type 'longrope': {name} has {len(factors)} numbers, not {turned // 2}"
                )

    def for_lengths(self, longest: int) -> "RopeConfig":
        """For sequences of up to so many tokens.

        What a token's keys are must not depend on how long its sequence becomes, since they are cached: other than in
        transformers, the longest sequence that is allowed decides which factors of longrope are used for all.
        """
        if self.kind != "longrope" or longest > self.original_max_len:
            return self
        return dataclasses.replace(self, factors=self.short_factors)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position, f32[turned / 2]; reckoned in float64, so that they are the same on every device."""
        turned = self.turned(head_dim)
        plain = self.theta ** (-np.arange(0, turned, 2) / turned)
        if self.kind == "longrope":
            return (plain / np.array(self.factors)).astype(np.float32)
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
    share = take_positive(fields, "partial_rotary_factor", take_positive(raw, "partial_rotary_factor", 1.0))
    older = fields.pop("type", "default")
    older = "longrope" if older == "su" else older  # as it was called first
    kind = fields.pop("rope_type", older)
    if kind not in KINDS:
        raise ConfigError(f"rope scaling of type {kind!r} is not supported; supported are {', '.join(KINDS)}")
    try:
        rope = _scaled(kind, theta, fields, raw.get("max_position_embeddings"))
    except ConfigError as error:
        raise ConfigError(f"rope scaling of type {kind!r}: {error}") from None
    if fields:
        raise ConfigError(f"rope scaling of type {kind!r} has unknown fields {fields}")
    return dataclasses.replace(rope, share=share)


def _scaled(kind: str, theta: float, fields: dict[str, Any], max_len: Any) -> RopeConfig:
    if kind == "default":
        return RopeConfig(theta)
    if kind == "longrope":
        return _long(theta, fields, max_len)
    factor = take_positive(fields, "factor")
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    low, high = take_positive(fields, "low_freq_factor"), take_positive(fields, "high_freq_factor")
    if low >= high:
        raise ConfigError(f"low_freq_factor ({low}) must be below high_freq_factor ({high})")
    return RopeConfig(theta, kind, factor, low, high, take_count(fields, "original_max_position_embeddings"))


def _long(theta: float, fields: dict[str, Any], max_len: Any) -> RopeConfig:
    original = take_count(fields, "original_max_position_embeddings")
    ratio = take_positive(
        fields, "factor", take_count({"max_position_embeddings": max_len}, "max_position_embeddings") / original
    )
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 and original > 1 else 1.0
    amplitude = take_positive(fields, "attention_factor", usual)
    both: dict[str, tuple[float, ...]] = {}
    for key in ("long_factor", "short_factor"):
        given = fields.pop(key, None)
        if not isinstance(given, list):
            raise ConfigError(f"{key} must be a list of numbers, not {given!r}")
        both[key] = tuple(take_positive({key: number}, key) for number in given)
    factors, short = both["long_factor"], both["short_factor"]
    return RopeConfig(
        theta, "longrope", original_max_len=original, factors=factors, short_factors=short, amplitude=amplitude
    )
