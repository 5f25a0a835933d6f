"""Sessions of texts: chats, questions about a document, agents. Only the lengths of the texts are used.

A line has ``turns`` of ``u`` and ``a``; or ``doc`` and ``qa`` of ``q`` and ``a``; or ``question`` and ``steps`` of
``gen`` and ``obs``, and the name of a ``prefix`` that stands in ``prefixes.json`` beside the file and that all sessions
share. Answers are replaced by what the cluster makes, of the same length.
"""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from jmemserve.errors import ConfigError
from jmemserve.simulator.load import Job, Load, stretch
from jmemserve.simulator.traces import read_lines, scaled

CHARACTERS = 4.2  # of English text per token
DOCUMENT = 1_700  # tokens of a document that are asked about


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """Turns of (tokens that the user adds, tokens of the answer); each is sent after the answer before has come."""

    turns: tuple[tuple[int, int], ...]
    prefix: int = 0  # tokens before the first turn
    shared: str = ""  # sessions that have the same prefix give it the same name
    chained: bool = True  # a prompt has all turns before it, else only the prefix


def read_sessions(path: Path) -> list[Session]:
    """The sessions of a file. Raises ConfigError."""
    prefixes: dict[str, str] = {}
    beside = path.with_name("prefixes.json")
    if beside.is_file():
        try:
            prefixes = json.loads(beside.read_text())
        except ValueError as error:
            raise ConfigError(f"--trace: {beside}: {error}") from None

    def parse(line: dict[str, Any]) -> Session:
        if "turns" in line:
            return Session(tuple((_tokens(turn["u"]), _tokens(turn["a"])) for turn in line["turns"]))
        if "doc" in line:
            asked = tuple((_tokens(item["q"]), _tokens(item["a"])) for item in line["qa"])
            return Session(asked, min(_tokens(line["doc"]), DOCUMENT), chained=False)
        texts = [line["question"], *(step["obs"] for step in line["steps"])]
        turns = tuple((_tokens(u), _tokens(step["gen"])) for u, step in zip(texts, line["steps"], strict=False))
        return Session(turns, _tokens(prefixes[line["prefix"]]), line["prefix"])

    return [session for session in read_lines(path, parse) if session.turns]


def _tokens(text: str) -> int:
    return max(1, round(len(text) / CHARACTERS))


def converse(
    sessions: list[Session],
    requests: int,
    rate: float,
    think_s: float,
    seed: int,
    scale: int = 1,
    longest: int = 1 << 30,
) -> Load:
    """Sessions begin at random times, so that ``rate`` requests per second come; a turn follows ``think_s`` (a mean)
    after the answer before, and its prompt has that answer's own tokens. After the last session the first comes again.

    A session ends where a turn would have more than ``longest`` tokens.
    """
    rng, now, left = np.random.default_rng(seed), 0.0, requests
    sizes = [_sized(session, scale, longest) for session in sessions]
    if not any(sizes):
        raise ConfigError(f"no session fits into {longest} tokens; raise --kv-tokens or --scale")
    per_session = sum(len(turns) for turns in sizes) / sum(bool(turns) for turns in sizes)
    names = {name: 1 + place for place, name in enumerate(sorted({s.shared for s in sessions}))}
    for number in itertools.count():
        session, turns = sessions[number % len(sessions)], sizes[number % len(sessions)][:left]
        if left == 0:
            return
        if not turns:
            continue
        left -= len(turns)
        now += float(rng.exponential(per_session / rate))
        pauses = rng.exponential(think_s, len(turns)).tolist() if think_s else [0.0] * len(turns)
        name = names[session.shared] if session.shared else len(names) + 1 + 2 * number
        prefix = stretch(name, scaled(session.prefix, scale)) if session.prefix else []
        talk = _Talk(f"s{number}", len(names) + 2 + 2 * number, turns, pauses, session.chained)
        yield now, talk.job(prefix, 0, 0)


def _sized(session: Session, scale: int, longest: int) -> list[tuple[int, int]]:
    """The turns after scaling, up to the first that is too long."""
    turns, before = [], scaled(session.prefix, scale) if session.prefix else 0
    for user, answer in session.turns:
        u, a = scaled(user, scale), scaled(answer, scale)
        if before + u + a > longest:
            break
        turns.append((u, a))
        before += u + a if session.chained else 0
    return turns


@dataclasses.dataclass(frozen=True, slots=True)
class _Talk:
    """One session under way."""

    name: str
    number: int  # of its own texts
    turns: list[tuple[int, int]]
    pauses: list[float]
    chained: bool

    def job(self, before: list[int], said: int, turn: int) -> Job:
        """The request of a turn, ``before`` being what its prompt begins with and ``said`` the user's tokens so far."""
        user, answer = self.turns[turn]

        def make() -> list[int]:
            return [*before, *stretch(self.number, said + user)[said:]]

        follows = functools.partial(self._after, before, said + user, turn + 1) if turn + 1 < len(self.turns) else None
        return Job(self.name, make, answer, follows)

    def _after(
        self, before: list[int], said: int, turn: int, prompt: list[int], answer: list[int]
    ) -> tuple[float, Job]:
        history = [*prompt, *answer] if self.chained else before
        return self.pauses[turn], self.job(history, said, turn)
