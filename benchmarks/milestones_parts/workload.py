"""Conversations: what the users say, and how long the answers are."""

import dataclasses
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHARACTERS = 4  # of a text per token, roughly; only lengths are taken from texts


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """What a user says, and how many tokens the answer has."""

    user: tuple[int, ...]
    answer: int


Session = tuple[Turn, ...]
Lengths = list[tuple[int, int]]  # (user, answer) tokens of each turn


def alike(sessions: int, turns: int, user: int, answer: int) -> list[Lengths]:
    """Sessions that are all of one shape."""
    return [[(user, answer)] * turns for _ in range(sessions)]


def recorded(folder: Path, sessions: int, turns: int, divide: int, longest: int, seed: int) -> list[Lengths]:
    """The lengths of conversations in a folder's JSON files, divided, and none above ``longest``.

    Only those with enough turns, cut to so many. Raises SystemExit if there are too few.
    """
    found = []
    for talk in _talks(folder):
        if len(talk) >= turns:
            sizes = [[-(-len(text) // (CHARACTERS * divide)) for text in pair] for pair in talk[:turns]]
            found.append([(min(max(1, user), longest), min(max(2, answer), longest)) for user, answer in sizes])
    if len(found) < sessions:
        raise SystemExit(f"{folder} has {len(found)} conversations of {turns} turns; {sessions} are asked for")
    return random.Random(seed).sample(found, sessions)


def fill(lengths: list[Lengths], vocab_size: int, seed: str) -> list[Session]:
    """Sessions of these lengths whose users say random tokens."""
    rng = random.Random(seed)
    return [
        tuple(Turn(tuple(rng.randrange(3, vocab_size) for _ in range(user)), answer) for user, answer in session)
        for session in lengths
    ]


def _talks(folder: Path) -> Iterator[list[tuple[str, str]]]:
    """(user, answer) texts of every conversation."""
    for path in sorted(folder.iterdir()):
        opened: Any = gzip.open if path.suffix == ".gz" else open
        if ".json" not in path.name:
            continue
        with opened(path, "rt", encoding="utf-8") as file:
            if ".jsonl" in path.name:
                items = [json.loads(line) for line in file if line.strip()]
            else:
                items = json.load(file)
        for item in items if isinstance(items, list) else []:
            if talk := _turns(item):
                yield talk


def _turns(item: Any) -> list[tuple[str, str]]:
    """The turns of one record: {"turns": [{"u", "a"}]}, or ShareGPT's {"conversations": [{"from", "value"}]}."""
    if not isinstance(item, dict):
        return []
    if "turns" in item:
        return [(turn["u"], turn["a"]) for turn in item["turns"] if isinstance(turn, dict) and {"u", "a"} <= set(turn)]
    said = [(message.get("from"), message.get("value", "")) for message in item.get("conversations", [])]
    while said and said[0][0] not in ("human", "user"):
        said = said[1:]
    pairs = zip(said[::2], said[1::2], strict=False)
    return [(user, answer) for (one, user), (other, answer) in pairs if one in ("human", "user") and other != one]
