"""Questions about documents, as in LooGLE: every prompt of a session is its document and one question (paper 7.5.7).

With share ratio r every session comes r times: others ask the same questions about the same document. So a policy
that knows sessions finds a document again within one, and one that knows prompts finds it in the others too.
"""

import dataclasses
import gzip
import json
import random
from pathlib import Path

CHARACTERS = 4.2  # of English text per token


@dataclasses.dataclass(frozen=True, slots=True)
class Lengths:
    """Of one session, in tokens."""

    document: int
    turns: tuple[tuple[int, int], ...]  # (question, answer)


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """One session of a run: prompts and lengths of answers, each sent when the answer before has come."""

    name: str
    start_s: float
    turns: tuple[tuple[tuple[int, ...], int], ...]


def alike(sessions: int, document: int, questions: int, question: int, answer: int) -> list[Lengths]:
    """Sessions of one shape."""
    return [Lengths(document, ((question, answer),) * questions) for _ in range(sessions)]


def recorded(path: Path, sessions: int, questions: int, divide: int, document: int) -> list[Lengths]:
    """Lengths of the documents and questions of a JSON-lines file; more sessions than it has reuse its lengths.

    ``document``: tokens of a document that are asked about, at most. All are divided by ``divide``.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file if line.strip()]
    found: list[Lengths] = []
    for record in records:
        asked = [(_tokens(item["q"], divide), max(2, _tokens(item["a"], divide))) for item in record["qa"]]
        length = min(_tokens(record["doc"], 1), document) // divide
        found += [
            Lengths(length, tuple(asked[at : at + questions])) for at in range(0, len(asked) - questions + 1, questions)
        ]
    if not found:
        raise SystemExit(f"{path} has no document with {questions} questions")
    return [found[place % len(found)] for place in range(sessions)]


def _tokens(text: str, divide: int) -> int:
    return max(1, round(len(text) / CHARACTERS / divide))


def copies(lengths: list[Lengths], ratio: int, rate: float, vocab_size: int, seed: str) -> list[Session]:
    """Every session ``ratio`` times, in random order; ``rate`` of them begin per second, at random times."""
    rng = random.Random(seed)

    def words(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocab_size) for _ in range(count))

    texts = []
    for one in lengths:
        document = words(one.document)
        texts.append(tuple(((*document, *words(question)), answer) for question, answer in one.turns))
    order = [(place, copy) for place in range(len(texts)) for copy in range(ratio)]
    rng.shuffle(order)
    now, sessions = 0.0, []
    for place, copy in order:
        now += rng.expovariate(rate)
        sessions.append(Session(f"s{place}.{copy}", now, texts[place]))
    return sessions
