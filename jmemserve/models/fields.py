"""Taking checked values out of a config.json. Whatever is not of the type and size that it must be is a ConfigError.

Each function removes its key from ``raw``, so that what nobody took can be refused in the end.
"""

import json
from pathlib import Path
from typing import Any

from jmemserve.errors import ConfigError

MAX_COUNT = 2**31 - 1  # indices are int32
MAX_NUMBER = 1e38  # float32 holds no more


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ConfigError when it cannot be read as one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def is_whole(value: Any) -> bool:
    """A JSON integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def take_count(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; ``default`` stands for a missing or null one, unless it is None."""
    value: Any = raw.pop(key, None)
    if value is None:
        value = default
    if not is_whole(value) or not 1 <= value <= MAX_COUNT:
        raise ConfigError(f"{key} must be a positive whole number, not {value!r}")
    return value


def take_positive(raw: dict[str, Any], key: str, default: float | None = None) -> float:
    """A finite number above 0; ``default`` stands for a missing or null one, unless it is None."""
    value: Any = raw.pop(key, None)
    if value is None:
        value = default
    if not (is_whole(value) or isinstance(value, float)) or not 0 < value <= MAX_NUMBER:  # NaN is neither
        raise ConfigError(f"{key} must be a number above 0, not {value!r}")
    return float(value)


def take_cap(raw: dict[str, Any], key: str) -> float | None:
    """A finite number above 0; None for a missing or null one."""
    value = raw.pop(key, None)
    return None if value is None else take_positive({key: value}, key)


def take_flag(raw: dict[str, Any], key: str) -> bool:
    """true or false; missing or null is false."""
    value = raw.pop(key, None)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, not {value!r}")
    return bool(value)


def take_ids(raw: dict[str, Any], key: str) -> frozenset[int]:
    """One token id, a list of them, or none."""
    value = raw.pop(key, None)
    many = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_whole(item) and item >= 0 for item in many):
        raise ConfigError(f"{key} must be a token id or a list of them, not {value!r}")
    return frozenset(many)


def refuse_flags(raw: dict[str, Any], *keys: str) -> None:
    """Take switches that change the numbers and are not implemented; each must be off."""
    for key in keys:
        if take_flag(raw, key):
            raise ConfigError(f"field {key!r} with value True is not supported")
