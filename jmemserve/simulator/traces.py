"""Hash traces in the form of Mooncake's.

A line is ``{"timestamp": ms, "input_length": n, "output_length": m, "hash_ids": [...]}``: an id stands for 512 tokens
and for all that comes before them, and the last one for what is left.
"""

import dataclasses
import functools
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jmemserve.errors import ConfigError
from jmemserve.simulator.load import Job, Load, words

SOURCE_BLOCK = 512  # tokens that a hash id stands for


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One line of a hash trace."""

    time: float  # seconds
    prompt: int
    output: int
    ids: tuple[int, ...]


def read_lines[T](path: Path, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """Every line of a JSON Lines file, compressed or not. Raises ConfigError that names the file and the line."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            lines = file.readlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace {path}: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"--trace {path}, line {number}: {type(error).__name__}: {error}") from None
    if not found:
        raise ConfigError(f"--trace {path} has no lines")
    return found


def is_hash_trace(path: Path) -> bool:
    """Whether a file is of this form; else it is one of sessions. Raises ConfigError for neither."""
    first = read_lines(path, lambda line: line)[0]
    if not isinstance(first, dict) or not {"hash_ids", "turns", "doc", "steps"} & first.keys():
        raise ConfigError(
            f"--trace {path}, line 1: neither of a hash trace (timestamp, input_length, output_length, hash_ids) nor "
            "of a session (turns; or doc and qa; or question and steps)"
        )
    return "hash_ids" in first


def read_calls(path: Path) -> list[Call]:
    """The lines of a hash trace, by time. Raises ConfigError."""

    numbers: dict[int, int] = {}  # ids may be hashes of any width

    def parse(line: dict[str, Any]) -> Call:
        ids = tuple(numbers.setdefault(int(i), len(numbers)) for i in line["hash_ids"])
        call = Call(line["timestamp"] / 1000, int(line["input_length"]), int(line["output_length"]), ids)
        if call.prompt < 1 or not (len(ids) - 1) * SOURCE_BLOCK < call.prompt <= len(ids) * SOURCE_BLOCK:
            raise ValueError(f"{len(ids)} hash ids of {SOURCE_BLOCK} tokens do not fit input_length {call.prompt}")
        if call.output < 0 or not 0 <= call.time < math.inf:
            raise ValueError(f"timestamp {call.time} and output_length {call.output} must be 0 or more")
        return call

    return sorted(read_lines(path, parse), key=lambda call: call.time)


def replay(calls: list[Call], requests: int, speed: float = 1.0, scale: int = 1, longest: int = 1 << 30) -> Load:
    """An open loop at the trace's times, ``speed`` times as fast; ``scale`` tokens of the trace become one.

    After the last line it begins anew with fresh ids, but for those that begin a tenth of all prompts or more (system
    prompts). Lines with more than ``longest`` tokens in all, after scaling, are left out.
    """
    per_block = max(1, SOURCE_BLOCK // scale)
    firsts: dict[int, int] = {}
    for call in calls:
        firsts[call.ids[0]] = firsts.get(call.ids[0], 0) + 1
    common = frozenset(i for i, count in firsts.items() if 10 * count >= len(calls))
    fitting = [call for call in calls if scaled(call.prompt, scale) + scaled(call.output, scale) <= longest]
    if not fitting:
        raise ConfigError(f"no line of the trace has at most {longest} tokens; raise --kv-tokens or --scale")
    span, fresh = calls[-1].time + calls[-1].time / max(1, len(calls)), max(max(call.ids) for call in calls) + 1
    for number in range(requests):
        copy, place = divmod(number, len(fitting))
        call = fitting[place]
        make = functools.partial(_prompt, call, scaled(call.prompt, scale), per_block, copy * fresh, common)
        yield (call.time + copy * span) / speed, Job(f"c{copy}.{place}", make, scaled(call.output, scale))


def scaled(tokens: int, scale: int) -> int:
    """So many tokens where ``scale`` of them are one."""
    return max(1, round(tokens / scale))


def _prompt(call: Call, length: int, per_block: int, shift: int, common: frozenset[int]) -> list[int]:
    ids = np.array([i if i in common else i + shift for i in call.ids], np.int64)
    return words((ids[:, None] * per_block + np.arange(per_block)).ravel())[:length]
