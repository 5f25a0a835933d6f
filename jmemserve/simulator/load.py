"""What is asked of a cluster: jobs, some of which follow on others. The same seed gives the same load."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np

from jmemserve.errors import ConfigError

_WORDS = tuple(range(1 << 15))  # every made-up token is one of these objects, so that a prompt is 8 bytes per token
_OBJECTS = np.array(_WORDS, dtype=object)


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One request. ``prompt()`` makes its tokens when it is sent; ``after(prompt, answer)`` is what follows on it."""

    session: str
    prompt: Callable[[], list[int]]
    output: int  # tokens to generate
    after: Callable[[list[int], list[int]], tuple[float, "Job"] | None] | None = None  # (seconds later, what)


Load = Iterator[tuple[float, Job]]  # by time in seconds, never falling


def words(numbers: np.ndarray) -> list[int]:
    """Token ids made of any whole numbers, equal ones from equal ones."""
    mixed = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return _OBJECTS[(mixed >> np.uint64(49)).astype(np.int64)].tolist()


def made_up(seed: int, place: int) -> int:
    """The token at a place of an answer."""
    return _WORDS[(seed * 40_503 + place * 9_973) & 32_767]


def stretch(name: int, length: int) -> list[int]:
    """``length`` tokens that no other name has."""
    return words(np.arange(length, dtype=np.int64) + (name << 24))


def poisson(requests: int, rate: float, prompt: int, output: int, shared: int, seed: int) -> Load:
    """Requests at random times, ``rate`` per second; the first ``shared`` tokens of their prompts are everybody's."""
    if not (requests >= 1 and rate > 0 and prompt >= 1 and output >= 1 and 0 <= shared <= prompt):
        raise ConfigError(
            f"a Poisson load needs requests, a rate, a prompt and an output above 0 and a shared prefix no longer than "
            f"the prompt, not {requests=}, {rate=}, {prompt=}, {output=}, {shared=}"
        )
    return _poisson(requests, rate, prompt, output, shared, seed)


def _poisson(requests: int, rate: float, prompt: int, output: int, shared: int, seed: int) -> Load:
    rng, now = np.random.default_rng(seed), 0.0
    common = stretch(0, shared)

    def make(number: int) -> list[int]:
        return [*common, *stretch(number, prompt - shared)]

    for number in range(1, requests + 1):
        now += float(rng.exponential(1 / rate))
        yield now, Job(f"s{number}", functools.partial(make, number), output)
