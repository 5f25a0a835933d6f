"""Does what a plan says: plan -> arrays -> the compiled step -> a flight whose tokens arrive later.

``launch`` never waits for the device. The pages are donated to every step and have one name, in the store. A token
that is sampled but not yet seen by the host is read by the next step from the previous step's output, on the device.
Every shape is compiled ahead; an unknown one is a bug, not a surprise compilation.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmemserve.engine import sampling
from jmemserve.engine.mesh import AXIS
from jmemserve.kernels import Ragged, attention_backend, own_products
from jmemserve.kernels.pages import page_axes
from jmemserve.kernels.rule import Rule
from jmemserve.kvpool.store import PageStore
from jmemserve.models.decoder import Ops
from jmemserve.scheduler.plan import Plan, StepShape
from jmemserve.types import INVALID, MAX_STOP_IDS, TokenLogprobs


@dataclasses.dataclass(frozen=True, slots=True)
class Flight:
    """A step in the air. ``tokens`` is on the device until ``read`` waits for it."""

    plan: Plan
    tokens: jax.Array  # i32[max_seqs]
    logprobs: tuple[jax.Array, ...] | None  # of sampling.describe, when a row wants them
    launched: float = dataclasses.field(default_factory=time.monotonic)

    def read(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Wait for the step; the sampled token of each row, and its log probabilities where they were asked for."""
        tokens = np.asarray(self.tokens).tolist()
        described: list[TokenLogprobs | None] = [None] * len(self.plan.slices)
        if self.logprobs is not None:
            chosen, rank, ids, top = (np.asarray(x) for x in self.logprobs)
            for row, piece in enumerate(self.plan.slices):
                wanted = piece.sequence.request.params.logprobs
                if wanted is not None and piece.samples:
                    best = zip(ids[row, :wanted].tolist(), top[row, :wanted].tolist(), strict=True)
                    described[row] = TokenLogprobs(tokens[row], float(chosen[row]), int(rank[row]), tuple(best))
        return tokens, described


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """All that the host gives for one step. On a mesh of several processes each of them must give the same."""

    shape: StepShape
    ints: np.ndarray  # of ``_make_ints``
    penalties: tuple[np.ndarray, ...] | None  # history, counts, banned, floats, from_last of ``sampling.penalize``
    draw: tuple[np.ndarray, ...] | None  # of ``sampling.draw``; None: every row is greedy
    describe: bool  # somebody wants log probabilities


class Runner:
    """The model of one instance on its mesh, compiled for every shape of its list.

    ``record(order)`` hears of every step before it is enqueued; where other processes have a part of the mesh, it
    tells them.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        state: nnx.State,
        store: PageStore,
        mesh: Mesh,
        shapes: tuple[StepShape, ...],
        vocab_size: int,
        max_model_len: int,
        backend: str = "xla",
    ):
        self.store, self.backend = store, backend
        self.record: Callable[[Order], None] = lambda order: None
        self.leads = False  # other processes hear of it
        self.padding_free = own_products(backend) is not None and mesh.size == 1
        self.shapes = shapes
        self.max_seqs = max(shape.seqs for shape in shapes)
        self.width = -(-max_model_len // store.layout.block_size)
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._leaves, self._structure = jax.tree.flatten(state)
        self._everywhere = NamedSharding(mesh, P())
        self._last = self._put(np.zeros(self.max_seqs, np.int32))
        self._step = _make_step(graph, self._structure, mesh, backend)
        self._steps: dict[StepShape, Callable] = {}
        self._samplers: dict[tuple[str, int], Callable] = {}

    # -- compiling --------------------------------------------------------------------------------------------

    def programs(self) -> list[Callable[[], None]]:
        """One function per program; calling it compiles it (or loads it from the persistent cache)."""
        steps = [lambda shape=shape: self._compile_step(shape) for shape in self.shapes]
        rows = sorted({shape.seqs for shape in self.shapes})
        samplers = [lambda name=name, n=n: self._compile_sampler(name, n) for n in rows for name in _SAMPLERS]
        return [*steps[::-1], *samplers]

    def compile_all(self, threads: int) -> Iterator[None]:
        """Compile everything; yields once per program."""
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(program) for program in self.programs()]:
                done.result()
                yield
        self.store.warm_up()

    def add_shapes(self, shapes: tuple[StepShape, ...]) -> None:
        """Compile what these need more than is there, while steps go on; from any thread."""
        for shape in shapes:
            if shape not in self._steps:
                self._compile_step(shape)
            for name in _SAMPLERS:
                if (name, shape.seqs) not in self._samplers:
                    self._compile_sampler(name, shape.seqs)
        self.shapes = tuple(sorted({*self.shapes, *shapes}))

    def _compile_step(self, shape: StepShape) -> None:
        ints = jax.ShapeDtypeStruct((_num_ints(shape, self.width),), jnp.int32, sharding=self._everywhere)
        out = (self.store.pages_sharding, self._everywhere)
        step = jax.jit(self._step, static_argnums=4, donate_argnums=1, out_shardings=out)
        lowered = step.lower(self._leaves, self.store.pages, self._last, ints, (shape, self.width))
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        pages = self.store.nbytes // self.store.pages_sharding.num_devices
        if memory is not None and pages > 1 << 28:
            temp = memory.temp_size_in_bytes
            assert temp < pages // 2, f"the step {shape} copies the pages: {temp=} bytes beside {pages=}"
        self._steps[shape] = compiled

    def _compile_sampler(self, name: str, rows: int) -> None:
        function, arguments = _SAMPLERS[name]
        shapes = arguments(self.vocab_size, rows, self.max_seqs, self.max_model_len)
        structs = [jax.ShapeDtypeStruct(shape, dtype, sharding=self._everywhere) for shape, dtype in shapes]
        if name in ("greedy", "draw"):
            function = _padded(function, self.max_seqs)
        jitted = jax.jit(function, out_shardings=self._everywhere)
        self._samplers[name, rows] = jitted.lower(*structs).compile()

    # -- running ----------------------------------------------------------------------------------------------

    def launch(self, plan: Plan) -> Flight:
        """Enqueue one step and return at once."""
        tokens, described = self.enqueue(self._make_order(plan))
        for array in (tokens, *(described or ())):
            array.copy_to_host_async()
        return Flight(plan, tokens, described)

    def enqueue(self, order: Order) -> tuple[jax.Array, tuple[jax.Array, ...] | None]:
        """Enqueue the step and the samplers that an order asks for: (tokens, what ``sampling.describe`` says)."""
        self.record(order)
        shape = order.shape
        if shape not in self._steps:
            self._compile_step(shape)  # only with warm-up switched off
        step = self._steps[shape]
        self.store.pages, logits = step(self._leaves, self.store.pages, self._last, self._put(order.ints))
        if order.penalties is not None:
            *arrays, from_last = (self._put(x) for x in order.penalties)
            logits = self._call("penalize", shape.seqs, logits, *arrays, self._last, from_last)
        if order.draw is None:
            tokens = self._call("greedy", shape.seqs, logits)
        else:
            tokens = self._call("draw", shape.seqs, logits, *(self._put(x) for x in order.draw))
        self._last = tokens
        return tokens, self._call("describe", shape.seqs, logits, tokens) if order.describe else None

    def _make_order(self, plan: Plan) -> Order:
        ints, from_last = _make_ints(plan, self.width, self.store.layout.block_size)
        shaped = any(_shaped(piece.sequence) for piece in plan.slices)
        params = [piece.sequence.request.params for piece in plan.slices]
        return Order(
            plan.shape,
            ints,
            (*_make_penalties(plan, self.max_model_len), from_last) if shaped else None,
            None if all(p.temperature == 0 for p in params) else _make_draw(plan),
            any(piece.samples and piece.sequence.request.params.logprobs is not None for piece in plan.slices),
        )

    def _call(self, name: str, rows: int, *arrays: jax.Array):
        if (name, rows) not in self._samplers:
            self._compile_sampler(name, rows)  # only with warm-up switched off
        return self._samplers[name, rows](*arrays)

    def _put(self, array: np.ndarray) -> jax.Array:
        return self.store.place(array, self._everywhere)


def _make_step(graph: nnx.GraphDef, structure, mesh: Mesh, backend: str) -> Callable:
    """The traced step: (leaves, pages, last, ints, (shape, width)) -> (pages, logits [V, B])."""
    kernel = attention_backend(backend)
    # On a mesh of several devices XLA divides the products, which it cannot do with others' code.
    products = own_products(backend) if mesh.size == 1 else None

    def step(leaves, pages, last, ints, key: tuple[StepShape, int]):
        shape, width = key
        tokens, ragged, from_last = _unpack(ints, shape, width)
        ends = jnp.maximum(ragged.starts[1:] - 1, 0)
        at = jnp.where(from_last >= 0, ends, shape.tokens)
        tokens = tokens.at[at].set(last[jnp.maximum(from_last, 0)], mode="drop")

        def attend(pages, layer: int, q, k, v, rule: Rule):
            def local(pages, q, k, v, ragged):
                return kernel(q, k, v, pages, layer, ragged, rule)

            if mesh.size == 1:
                return local(pages, q, k, v, ragged)
            heads, page = P(None, AXIS, None), P(*page_axes(not isinstance(pages, tuple)))
            specs = (page, heads, heads, heads, P())
            sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(heads, page), check_vma=False)
            return sharded(pages, q, k, v, ragged)

        model = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
        if products is None:
            hidden, pages = model(tokens, ragged.positions, pages, Ops(attend))
            return pages, model.logits(hidden[:, ends])
        packed = functools.partial(products, used=ragged.starts[-1])
        hidden, pages = model(tokens, ragged.positions, pages, Ops(attend, packed))
        rows = jnp.sum(ragged.context > 0, dtype=jnp.int32)
        return pages, model.logits(hidden[:, ends], functools.partial(products, used=rows))

    return step


def _num_ints(shape: StepShape, width: int) -> int:
    return 3 * shape.tokens + shape.seqs * (width + 3) + 1


def _unpack(ints: jax.Array, shape: StepShape, width: int) -> tuple[jax.Array, Ragged, jax.Array]:
    """The one array that travels to the device per step -> (tokens, where they live, rows of the last output)."""
    t, b = shape.tokens, shape.seqs
    sizes = (t, t, t, b * width, b, b + 1, b)
    edges = np.cumsum((0, *sizes))
    assert edges[-1] == _num_ints(shape, width), (edges[-1], shape, width)
    tokens, positions, slots, tables, context, starts, from_last = (
        ints[start:stop] for start, stop in zip(edges[:-1], edges[1:], strict=True)
    )
    return tokens, Ragged(positions, slots, tables.reshape(b, width), context, starts), from_last


def _make_ints(plan: Plan, width: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The step's integers, in the order of ``_unpack``; padding writes to page 0."""
    t, b = plan.shape.tokens, plan.shape.seqs
    tokens, positions, slots = np.zeros((3, t), np.int32)
    tables = np.zeros((b, width), np.int32)
    context, from_last = np.zeros(b, np.int32), np.full(b, INVALID, np.int32)
    starts = np.zeros(b + 1, np.int32)
    at = 0
    for row, piece in enumerate(plan.slices):
        seq, stop = piece.sequence, piece.start + piece.length
        end = at + piece.length
        host = seq.tokens[piece.start : stop]
        assert len(host) == piece.length - (piece.promised_row != INVALID), (len(host), piece)
        tokens[at : at + len(host)] = host
        table = np.array(seq.table[: -(-stop // block_size)], np.int32)
        tables[row, : len(table)] = table
        place = np.arange(piece.start, stop, dtype=np.int32)
        positions[at:end] = place
        slots[at:end] = table[place // block_size] * block_size + place % block_size
        context[row], from_last[row] = stop, piece.promised_row
        starts[row + 1] = at = end
    starts[len(plan.slices) + 1 :] = at
    return np.concatenate((tokens, positions, slots, tables.ravel(), context, starts, from_last)), from_last


def _make_draw(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of ``sampling.draw``."""
    floats = np.zeros((3, plan.shape.seqs), np.float32)
    floats[1] = 1
    ints = np.zeros((4, plan.shape.seqs), np.uint32)
    for row, piece in enumerate(plan.slices):
        request = piece.sequence.request
        params = request.params
        floats[:, row] = params.temperature, max(params.top_p, 1e-30), params.min_p  # no top_p is 0 in float32
        position = piece.start + piece.length
        ints[:, row] = max(0, params.top_k), request.seed >> 32, request.seed & 0xFFFFFFFF, position
    return floats, ints.view(np.int32)


def _shaped(seq) -> bool:
    """Do penalties or banned tokens change this sequence's logits?"""
    params = seq.request.params
    return params.has_penalties or seq.generated <= params.min_tokens and params.min_tokens > 0


def _make_penalties(plan: Plan, max_model_len: int) -> tuple[np.ndarray, ...]:
    """The first arrays of ``sampling.penalize``; rows without penalties get ones that change nothing."""
    rows = plan.shape.seqs
    history = np.zeros((rows, max_model_len), np.int32)
    counts = np.zeros((2, rows), np.int32)
    banned = np.full((rows, MAX_STOP_IDS), INVALID, np.int32)
    floats = np.zeros((3, rows), np.float32)
    floats[0] = 1
    for row, piece in enumerate(plan.slices):
        seq = piece.sequence
        params = seq.request.params
        history[row, : len(seq.tokens)] = seq.tokens
        counts[:, row] = len(seq.request.prompt), len(seq.tokens)
        floats[:, row] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        drawn_before = piece.start + piece.length - len(seq.request.prompt)
        if drawn_before < params.min_tokens:
            ids = sorted(seq.request.stop_ids)
            banned[row, : len(ids)] = ids
    return history, counts, banned, floats


def _padded(function: Callable, rows: int) -> Callable:
    """Let a sampler return i32[rows] whatever its batch is, so that the next step always reads the same shape."""

    def call(logits: jax.Array, *arrays: jax.Array) -> jax.Array:
        tokens = function(logits, *arrays)
        return jnp.zeros(rows, jnp.int32).at[: tokens.shape[0]].set(tokens)

    return call


def _describe(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
    return sampling.describe(logits, tokens[: logits.shape[1]])


_SAMPLERS: dict[str, tuple[Callable, Callable[[int, int, int, int], list]]] = {
    "greedy": (sampling.greedy, lambda v, b, r, m: [((v, b), jnp.float32)]),
    "draw": (sampling.draw, lambda v, b, r, m: [((v, b), jnp.float32), ((3, b), jnp.float32), ((4, b), jnp.int32)]),
    "penalize": (
        sampling.penalize,
        lambda v, b, r, m: [
            ((v, b), jnp.float32),
            ((b, m), jnp.int32),
            ((2, b), jnp.int32),
            ((b, MAX_STOP_IDS), jnp.int32),
            ((3, b), jnp.float32),
            ((r,), jnp.int32),
            ((b,), jnp.int32),
        ],
    ),
    "describe": (_describe, lambda v, b, r, m: [((v, b), jnp.float32), ((r,), jnp.int32)]),
}
