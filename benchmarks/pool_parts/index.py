"""The radix tree beside two indices of hashes (paper 7.5.2, figure 10)."""

import hashlib
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Protocol

import numpy as np
import xxhash
from pool_parts.api import BLOCK, random_tokens
from pool_parts.rows import Part, Row, median

from jmemserve.kvpool import BlockPool

LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LONG = (16_384, 65_536, 131_072)
PAPER_HASH_MS = dict(zip(LENGTHS, (0.141, 0.235, 0.442, 1.03, 2.89, 9.03, 31.5, 120), strict=True))
PAPER_RADIX_MS = dict(zip(LENGTHS, (0.100, 0.098, 0.115, 0.150, 0.216, 0.358, 0.635, 1.18), strict=True))
NAIVE_UP_TO = 16_384  # tokens; its time grows with the square


class Index(Protocol):
    """What is compared: finding a prefix, and adding one."""

    def find(self, tokens: list[int]) -> int:
        """How many blocks of it are there."""
        ...

    def add(self, tokens: list[int], blocks: Sequence[object]) -> None: ...

    def clear(self, tokens: list[int]) -> None: ...


class Radix:
    """The pool's own. ``add`` is the pool's insert, which also checks every address."""

    def __init__(self, num_blocks: int):
        self.pool = BlockPool("a", 1, num_blocks, BLOCK)

    def find(self, tokens: list[int]) -> int:
        return self.pool.peek(tokens) // BLOCK

    def add(self, tokens: list[int], blocks: Sequence[object]) -> None:
        self.pool.insert(tokens, blocks)  # type: ignore[arg-type]

    def clear(self, tokens: list[int]) -> None:
        self.pool.delete(tokens[:BLOCK])


class Chained:
    """A dictionary by the hash of (hash of the block before, this block's tokens)."""

    def __init__(self, digest: Callable[[bytes], bytes]):
        self._digest = digest
        self._blocks: dict[bytes, object] = {}

    def find(self, tokens: list[int]) -> int:
        raw, parent, step = np.asarray(tokens, np.int32).tobytes(), b"", 4 * BLOCK
        for start in range(0, len(raw) - step + 1, step):
            parent = self._digest(parent + raw[start : start + step])
            if parent not in self._blocks:
                return start // step
        return len(raw) // step

    def add(self, tokens: list[int], blocks: Sequence[object]) -> None:
        raw, parent, step = np.asarray(tokens, np.int32).tobytes(), b"", 4 * BLOCK
        for place in range(len(raw) // step):
            parent = self._digest(parent + raw[place * step : (place + 1) * step])
            self._blocks.setdefault(parent, blocks[place])

    def clear(self, tokens: list[int]) -> None:
        self._blocks.clear()


class Naive:
    """A dictionary by the hash of the whole prefix, taken anew for every block, as vLLM 0.4 did."""

    def __init__(self) -> None:
        self._blocks: dict[int, object] = {}

    def find(self, tokens: list[int]) -> int:
        for place in range(len(tokens) // BLOCK):
            if hash(tuple(tokens[: (place + 1) * BLOCK])) not in self._blocks:
                return place
        return len(tokens) // BLOCK

    def add(self, tokens: list[int], blocks: Sequence[object]) -> None:
        for place in range(len(tokens) // BLOCK):
            self._blocks.setdefault(hash(tuple(tokens[: (place + 1) * BLOCK])), blocks[place])

    def clear(self, tokens: list[int]) -> None:
        self._blocks.clear()


def measure(repeats: int, quick: bool) -> Part:
    """Milliseconds: of a prompt of which nothing is cached a look-up and an insert; of one that is, a look-up."""
    lengths = LENGTHS[:4] if quick else LENGTHS + LONG
    rng = np.random.default_rng(0)
    radix = Radix(max(lengths) // BLOCK)
    indices: dict[str, Index] = {
        "radix": radix,
        "xxh3_chain": Chained(lambda raw: xxhash.xxh3_128_digest(raw)),
        "sha256_chain": Chained(lambda raw: hashlib.sha256(raw).digest()),
        "whole_prefix": Naive(),
    }
    fresh, cached = [], []
    for length in lengths:
        tokens = random_tokens(rng, length + 1).tolist()  # a look-up leaves the last token out
        blocks = radix.pool.alloc_mem(length // BLOCK)
        new: Row = {"tokens": length}
        hit: Row = {"tokens": length}
        for name, index in indices.items():
            if name == "whole_prefix" and length > NAIVE_UP_TO:
                new[f"{name}_ms"] = hit[f"{name}_ms"] = None
                continue
            new[f"{name}_ms"], hit[f"{name}_ms"] = _times(index, tokens, blocks, 1 if length > 4096 else repeats)
        new |= {"paper_radix_ms": PAPER_RADIX_MS.get(length), "paper_hash_ms": PAPER_HASH_MS.get(length)}
        fresh.append(new)
        cached.append(hit)
        radix.pool.free_mem(blocks)
    return Part({"nothing cached: look-up and insert": fresh, "all cached: look-up": cached})


def _times(index: Index, tokens: list[int], blocks: Sequence[object], repeats: int) -> tuple[float, float]:
    fresh, cached = [], []
    for _ in range(repeats + 1):  # the first does not count
        start = perf_counter()
        assert index.find(tokens) == 0
        index.add(tokens, blocks)
        fresh.append(perf_counter() - start)
        start = perf_counter()
        count = index.find(tokens)
        cached.append(perf_counter() - start)
        assert count == len(tokens) // BLOCK, f"{count} of {len(tokens) // BLOCK} blocks were found"
        index.clear(tokens)
    return 1e3 * median(fresh[1:]), 1e3 * median(cached[1:])
