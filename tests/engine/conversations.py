"""Conversations of several turns: from real ones where their file is there, else generated."""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "sharegpt_en_a" / "sessions.jsonl.gz"
VOCABULARY = 97


def conversations(num: int, turns: int, longest: int = 14, seed: int = 0) -> list[list[list[int]]]:
    """``num`` conversations of ``turns`` user turns, each a list of 3 to ``longest`` token ids."""
    found = _real(num, turns, longest) if REAL.is_file() else []
    rng = np.random.default_rng(seed)
    while len(found) < num:
        lengths = rng.integers(3, longest + 1, turns)
        found.append([rng.integers(0, VOCABULARY, length).tolist() for length in lengths])
    return found


def _real(num: int, turns: int, longest: int) -> list[list[list[int]]]:
    """The first words of the first sessions that are long enough, as tokens of a small vocabulary."""
    found: list[list[list[int]]] = []
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        for line in file:
            said = [turn["u"] for turn in json.loads(line)["turns"]]
            tokens = [[zlib.crc32(word.encode()) % VOCABULARY for word in text.split()[:longest]] for text in said]
            tokens = [turn for turn in tokens if len(turn) >= 3][:turns]
            if len(tokens) == turns:
                found.append(tokens)
            if len(found) == num:
                break
    return found
