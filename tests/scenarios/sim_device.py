"""What an instance stands on, as plain values: a clock, memory that says whose it is, workers and a model.

A slot of a page holds a hash of all tokens up to its own, so a block that is read under other tokens than those it was
written for is seen at once; the next token is a hash of that, the seed and the place, so a token that was lost, doubled
or changed shows in every one that follows.
"""

import contextlib
import dataclasses
import random
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jmemserve.errors import TransferError
from jmemserve.kvpool.store import PageStore
from jmemserve.kvpool.transports import PieceSpec
from jmemserve.scheduler.plan import Plan, StepShape
from jmemserve.types import FinishReason, Request

VOCABULARY = 29
STOP = 7
_MASK = (1 << 61) - 1


def mixed(state: int, word: int) -> int:
    return ((state ^ (word + 1)) * 0x9E3779B97F4A7C15 + (state >> 29)) & _MASK


def slots_of(tokens: Sequence[int], salt: str = "") -> list[int]:
    """What the slots of these tokens hold."""
    state, slots = zlib.crc32(salt.encode()) + 1, []
    for token in tokens:
        state = mixed(state, token)
        slots.append(state)
    return slots


def next_token(slot: int, place: int, seed: int) -> int:
    """The model: ``slot`` is that of the last token, ``place`` that of the new one."""
    return mixed(mixed(slot, place), seed) % VOCABULARY


def truth(request: Request) -> tuple[list[int], FinishReason]:
    """The output that a request must have, whatever happens on its way."""
    tokens, made = list(request.prompt), []
    limit = request.params.max_tokens
    assert limit is not None
    state = slots_of(tokens, request.salt)[-1]
    while len(made) < limit:
        token = next_token(state, len(tokens), request.seed)
        if token in request.stop_ids:
            return made, FinishReason.STOP
        tokens.append(token)
        made.append(token)
        state = mixed(state, token)
    return made, FinishReason.LENGTH


class Clock:
    """Stands in for the module ``time``. Whoever sleeps on it is thrown out: one turn of a loop is over."""

    class Slept(Exception):
        pass

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        raise Clock.Slept


class Threads:
    """Stands in for the module ``threading``: what an instance runs beside itself runs at once; no loop starts."""

    Condition = threading.Condition

    class Thread:
        def __init__(self, target: Callable[[], None], name: str, daemon: bool):
            self._target, self._name = target, name

        def start(self) -> None:
            if self._name.endswith("-compile"):
                self._target()

        def is_alive(self) -> bool:
            return True


class Workers:
    """Stands in for a pool of threads: jobs wait until the world lets them run, in any order."""

    def __init__(self, *args: object):
        self.jobs: list[Callable[[], None]] = []

    def submit(self, function: Callable[..., None], *args: Any) -> None:
        self.jobs.append(lambda: function(*args))

    def run(self, rng: random.Random | None) -> None:
        """Run some jobs: all of them, or if there is a ``rng``, a part of them."""
        count = len(self.jobs) if rng is None else rng.randint(0, len(self.jobs))
        for _ in range(count):
            self.jobs.pop(0 if rng is None else rng.randrange(len(self.jobs)))()

    def shutdown(self, **how: object) -> None:
        self.jobs.clear()


class AtOnce:
    """Stands in for a pool of threads: jobs run when they are handed in."""

    def __init__(self, *args: object):
        pass

    def submit(self, function: Callable[..., None], *args: Any) -> None:
        function(*args)

    def shutdown(self, **how: object) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of a page of one slot per token."""

    page_shape: tuple[int, ...]
    num_layers: int = 1
    dtype: str = "int64"
    aggregated: bool = True

    @property
    def bytes_per_block(self) -> int:
        return self.page_shape[-1] * 8


class Pages:
    """Stands in for a PageStore (and for the arrays of a HostArena): a row of slots per block."""

    cuts = PageStore.cuts
    checksum_kind = "sim"
    sharding = part_sharding = None
    sizes = (1, 4, 16)

    def __init__(self, num_blocks: int, block_size: int):
        self.layout = Layout((block_size,))
        self.rows = np.zeros((num_blocks + 1, block_size), np.int64)

    def gather(self, numbers: Sequence[int]) -> np.ndarray:
        return self.rows[list(numbers)]

    def scatter(self, numbers: Sequence[int], piece: np.ndarray) -> None:
        self.rows[list(numbers)] = piece

    def checksums(self, piece: np.ndarray) -> np.ndarray:
        return np.asarray(piece).sum(axis=1)

    # -- as an arena --------------------------------------------------------------------------------------------------

    write = scatter

    def read(self, slots: Sequence[int], sharding: object) -> np.ndarray:
        return self.gather(slots)

    def slots_of(self, slots: Sequence[int]) -> list[np.ndarray]:
        return [self.rows[slot] for slot in slots]

    @contextlib.contextmanager
    def writable(self, slots: Sequence[int]) -> Iterator[list[np.ndarray]]:
        yield self.slots_of(slots)


class Wire:
    """What every transport of the world has published, and how many blocks went from where to where."""

    def __init__(self, rng: random.Random) -> None:
        self.broken = 0.0  # share of the fetches that fail
        self.rng = rng
        self.published: dict[tuple[str, str], np.ndarray] = {}
        self.moved: dict[tuple[str, str], int] = {}

    def forget(self, owner: str) -> None:
        """Its process has ended."""
        for key in [key for key in self.published if key[0] == owner]:
            del self.published[key]


class WireTransport:
    """One instance's end of the wire; a life has an owner's name of its own."""

    name = "local"

    def __init__(self, wire: Wire, instance: str, life: int):
        self._wire, self._instance, self.owner = wire, instance, f"{instance}#{life}"

    def endpoint(self) -> dict[str, Any]:
        return {"platform": "sim", "owner": self.owner, "instance": self._instance}

    def reaches(self, endpoint: Mapping[str, Any]) -> bool:
        return True

    def publish(self, key: str, piece: Any, frames: int, checksum: bool = True) -> dict[str, Any]:
        self._wire.published[self.owner, key] = np.array(piece)
        return {"key": key, "frames": frames, "sums": True}

    def fetch(
        self, endpoint: Mapping[str, Any], ticket: Mapping[str, Any], spec: PieceSpec, where: Any, timeout_s: float
    ) -> np.ndarray | None:
        piece = self._wire.published.get((endpoint["owner"], ticket["key"]))
        if piece is None or self._wire.broken and self._wire.rng.random() < self._wire.broken:
            raise TransferError(f"{ticket['key']} is not published")
        way = endpoint["instance"], self._instance
        self._wire.moved[way] = self._wire.moved.get(way, 0) + len(piece)
        if where is None:
            return piece.copy()
        for slot, row in zip(where, piece, strict=True):
            slot[:] = row
        return None

    def release(self, key: str) -> None:
        self._wire.published.pop((self.owner, key), None)

    def close(self) -> None:
        self._wire.forget(self.owner)


@dataclasses.dataclass
class Flight:
    """A step in the air: the host may see ``tokens`` one turn later."""

    plan: Plan
    tokens: list[int]
    launched: float
    arrays_s: float = 0.0
    dispatch_s: float = 0.0
    over: bool = False

    def read(self) -> tuple[list[int], None]:
        return self.tokens, None


class Model:
    """Stands in for a Runner: a step writes its tokens' slots, after all before them were looked at."""

    def __init__(self, store: Pages, shapes: tuple[StepShape, ...], clock: Clock):
        self.store, self.shapes, self._clock = store, shapes, clock
        self.computed = 0  # tokens, over all steps
        self._last: list[int] = []

    def add_shapes(self, shapes: tuple[StepShape, ...]) -> None:
        self.shapes = shapes

    def launch(self, plan: Plan) -> Flight:
        lengths = [piece.length for piece in plan.slices]
        assert sum(lengths) <= plan.shape.tokens and len(lengths) <= plan.shape.seqs, (plan.shape, lengths)
        tokens = [self._row(piece) for piece in plan.slices]
        self._last = tokens
        return Flight(plan, tokens, self._clock.now)

    def _row(self, piece: Any) -> int:
        seq, stop, rows = piece.sequence, piece.start + piece.length, self.store.rows
        known = list(seq.tokens[:stop])
        if piece.promised_row >= 0:
            known.append(self._last[piece.promised_row])
        assert len(known) == stop, f"{seq.request.id}: {len(known)} tokens are known of {stop}"
        assert seq.table == [block.index for block in seq.blocks], f"{seq.request.id}: a wrong table"
        slots, size = slots_of(known, seq.request.salt), rows.shape[1]
        assert stop <= len(seq.table) * size, f"{stop} tokens do not fit into {len(seq.table)} blocks"
        numbers = seq.table[: -(-stop // size)]
        held = rows[numbers].reshape(-1)[: piece.start].tolist()
        assert held == slots[: piece.start], f"{seq.request.id} reads what stands for other tokens"
        for place in range(piece.start, stop):
            rows[seq.table[place // size], place % size] = slots[place]
        self.computed += piece.length
        return next_token(slots[-1], stop, seq.request.seed)
