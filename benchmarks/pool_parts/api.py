"""The calls of the pool that move no bytes, in microseconds (paper 7.5.1, figure 9)."""

from collections.abc import Callable
from time import perf_counter

import numpy as np
from pool_parts.rows import Aim, Part, Row, median

from jmemserve.kvpool import BlockAddress, BlockPool

BLOCK = 16  # tokens
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PAPER_ALLOC = dict(zip(SIZES, (6.2, 6.5, 8.3, 10.7, 15.5, 24.5, 41.9, 76.3, 145), strict=True))
PAPER_FREE = dict(zip(SIZES, (5.8, 6.2, 7.9, 10.2, 12.4, 19.4, 31.6, 55.2, 106), strict=True))
RATIOS = tuple(range(0, 101, 10))  # per cent of the prompt that is cached
PAPER_INSERT = {
    256: (586, 573, 694, 496, 484, 435, 406, 669, 374, 516, 492),
    128: (301, 236, 231, 251, 390, 243, 210, 193, 195, 330, 161),
    64: (152, 155, 121, 139, 122, 132, 89, 93, 107, 87, 92),
}
PAPER_MATCH = {
    256: (2.6, 21, 44, 51, 218, 120, 117, 140, 166, 313, 331),
    128: (2.2, 42, 19, 27, 35, 175, 49, 66, 75, 94, 107),
    64: (1.8, 7.6, 11, 15, 30, 34, 25, 29, 34, 46, 41),
}
PROMPT = 256  # blocks of each prompt that fills the tree
Kinds = dict[str, Callable[[np.ndarray], list[int] | np.ndarray]]
KINDS: Kinds = {"list": lambda tokens: tokens.tolist(), "int32": lambda tokens: tokens}


def filled_pool(num_cached: int, spare: int, rng: np.random.Generator, prompt: int = PROMPT) -> BlockPool:
    """A pool with so many cached blocks, in prompts of ``prompt`` blocks, and ``spare`` free ones."""
    pool = BlockPool("a", 1, num_cached + spare, BLOCK)
    for start in range(0, num_cached, prompt):
        count = min(prompt, num_cached - start)
        blocks = pool.alloc_mem(count)
        pool.insert(random_tokens(rng, count * BLOCK), blocks)
        pool.free_mem(blocks)
    return pool


def random_tokens(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 32000, count, np.int32)


def measure(repeats: int, quick: bool) -> Part:
    """All of it. Times are medians in microseconds; each repeat is many calls."""
    calls = 5 if quick else 20
    rng = np.random.default_rng(0)
    part = Part()
    part.tables["alloc and free"] = _memory_rows(repeats * calls)
    sizes = (64,) if quick else (64, 128, 256)
    small = filled_pool(1024, 3 * max(sizes), rng)
    part.tables["insert and match by cached share"] = [
        _index_row(small, size, ratio, kind, repeats * calls, rng)
        for size in sizes
        for kind in KINDS
        for ratio in (RATIOS[::5] if quick else RATIOS)
    ]
    part.tables["256 blocks, half cached, by blocks in the tree"] = [
        {"in_tree": count} | _index_row(pool, 256, 50, kind, repeats * calls, rng)
        for count in ((1_000,) if quick else (1_000, 10_000, 100_000, 1_000_000))
        for pool in (filled_pool(count, 3 * 256, rng),)
        for kind in KINDS
    ]
    _add_aims(part, max(sizes))
    return part


def _add_aims(part: Part, size: int) -> None:
    largest = part.tables["alloc and free"][-1]
    rows = [row for row in part.tables["insert and match by cached share"] if row["blocks"] == size]
    part.aims += [
        Aim("alloc", largest["alloc_us_per_block"], 0.5, "us/block"),
        Aim("free", largest["free_us_per_block"], 0.4, "us/block"),
    ]
    for kind in KINDS:
        mine = [row for row in rows if row["tokens"] == kind]
        part.aims += [
            Aim(f"match of {size} blocks, {kind}, worst share", max(row["match_us"] for row in mine), 100, "us"),
            Aim(f"insert of {size} blocks, {kind}, worst share", max(row["insert_us"] for row in mine), 250, "us"),
        ]


def _memory_rows(calls: int) -> list[Row]:
    pool = BlockPool("a", 1, 1024, BLOCK)
    rows = []
    for size in SIZES:
        allocs, frees = [], []
        for _ in range(calls):
            start = perf_counter()
            blocks = pool.alloc_mem(size)
            middle = perf_counter()
            pool.free_mem(blocks)
            frees.append(perf_counter() - middle)
            allocs.append(middle - start)
        alloc, free = 1e6 * median(allocs), 1e6 * median(frees)
        rows.append(
            {
                "blocks": size,
                "alloc_us": alloc,
                "paper_alloc_us": PAPER_ALLOC[size],
                "free_us": free,
                "paper_free_us": PAPER_FREE[size],
                "alloc_us_per_block": alloc / size,
                "free_us_per_block": free / size,
            }
        )
    return rows


def _index_row(pool: BlockPool, size: int, ratio: int, kind: str, calls: int, rng: np.random.Generator) -> Row:
    """One prompt of ``size`` blocks of which ``ratio`` per cent are cached; everything is put back afterwards."""
    tokens = random_tokens(rng, size * BLOCK + 1)  # one more, since match leaves the last token out
    cached = size * ratio // 100
    given, whole = KINDS[kind](tokens), KINDS[kind](tokens[:-1])
    blocks: list[BlockAddress] = pool.alloc_mem(size)
    inserts, matches, releases = [], [], []
    for _ in range(calls):
        pool.insert(tokens[: cached * BLOCK], blocks[:cached])
        start = perf_counter()
        found = pool.match(given)
        matches.append(perf_counter() - start)
        assert found.num_tokens == cached * BLOCK, (found.num_tokens, cached * BLOCK)
        start = perf_counter()
        found.release()
        releases.append(perf_counter() - start)
        start = perf_counter()
        duplicates = pool.insert(whole, blocks)
        inserts.append(perf_counter() - start)
        assert not duplicates, f"{len(duplicates)} duplicates"
        assert pool.delete(tokens[:BLOCK]) == size
    pool.free_mem(blocks)
    place = RATIOS.index(ratio)
    return {
        "blocks": size,
        "tokens": kind,
        "cached_percent": ratio,
        "insert_us": 1e6 * median(inserts),
        "paper_insert_us": float(PAPER_INSERT[size][place]),
        "match_us": 1e6 * median(matches),
        "paper_match_us": float(PAPER_MATCH[size][place]),
        "release_us": 1e6 * median(releases),
    }
