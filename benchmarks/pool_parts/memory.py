"""How much memory the index needs for each cached block, beside the tokens themselves."""

import gc
import tracemalloc

import numpy as np
from pool_parts.api import BLOCK, random_tokens
from pool_parts.rows import Aim, Part, Row

from jmemserve.kvpool import BlockPool

TOKEN_BYTES = 4


def measure(repeats: int, quick: bool) -> Part:
    """Bytes by tracemalloc; these do not vary, so ``repeats`` is not used."""
    count = 20_000 if quick else 1_000_000
    rows = [_row(count, prompt) for prompt in ((256,) if quick else (256, 64, 8))]
    aim = Aim(f"index, {count:,} blocks in prompts of 256", rows[0]["bytes_per_block"], 200, "bytes/block")
    return Part(
        {"bytes per cached block": rows},
        [aim],
        ["tokens, and the tables of references and generations that every pool has, are counted apart"],
    )


def _row(count: int, prompt: int) -> Row:
    rng = np.random.default_rng(0)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        pool = BlockPool("a", 1, count, BLOCK)
        empty = tracemalloc.get_traced_memory()[0]
        for start in range(0, count, prompt):
            blocks = pool.alloc_mem(min(prompt, count - start))
            pool.insert(random_tokens(rng, len(blocks) * BLOCK), blocks)
            pool.free_mem(blocks)
            del blocks
        gc.collect()
        full = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert pool.cached == count, f"{pool.cached} of {count} blocks are cached"
    whole = (full - empty) / count
    return {
        "blocks": count,
        "prompt_blocks": prompt,
        "runs": pool.stats().runs,
        "token_bytes": TOKEN_BYTES * BLOCK,
        "bytes_per_block": whole - TOKEN_BYTES * BLOCK,
        "table_bytes_per_block": (empty - before) / count,
    }
