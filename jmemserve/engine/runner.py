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
from jmemserve.engine.mixing import mix_of
from jmemserve.engine.orders import Order, Orders, num_ints, unpack
from jmemserve.kernels import attention_backend, own_products
from jmemserve.kernels.pages import page_axes
from jmemserve.kernels.rule import Rule
from jmemserve.kvpool.store import PageStore
from jmemserve.models.ops import HINTS, Ops, project
from jmemserve.scheduler.plan import Plan, StepShape
from jmemserve.types import MAX_STOP_IDS, TokenLogprobs

BYTES_OF_TOKEN = 256 << 10  # of memory that a step may need for each of its tokens, whatever the model


@dataclasses.dataclass(frozen=True, slots=True)
class Flight:
    """A step in the air. ``tokens`` is on the device until ``read`` waits for it."""

    plan: Plan
    tokens: jax.Array  # i32[max_seqs]
    logprobs: tuple[jax.Array, ...] | None  # of sampling.describe, when a row wants them
    arrays_s: float = 0.0  # of the host, for the order
    dispatch_s: float = 0.0  # of the host, for enqueuing
    launched: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Has the device done it?"""
        return self.tokens.is_ready()  # type: ignore[attr-defined]  # every array of a device has it

    def read(self) -> tuple[list[int], list[TokenLogprobs | None] | None]:
        """Wait for the step; the sampled token of each row, and log probabilities where rows asked for them, if any."""
        tokens = np.asarray(self.tokens).tolist()
        if self.logprobs is None:
            return tokens, None
        described: list[TokenLogprobs | None] = [None] * self.plan.num_rows
        chosen, rank, ids, top = (np.asarray(x) for x in self.logprobs)
        for row, piece in enumerate(self.plan.slices):
            wanted = piece.sequence.request.params.logprobs
            if wanted is not None and piece.samples:
                best = zip(ids[row, :wanted].tolist(), top[row, :wanted].tolist(), strict=True)
                described[row] = TokenLogprobs(tokens[row], float(chosen[row]), int(rank[row]), tuple(best))
        return tokens, described


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
        self._far = mesh.devices.flat[0].platform != "cpu"  # from the host: what it waits for had better start early
        self.shapes = shapes
        self.max_seqs = max(shape.seqs for shape in shapes)
        self.width = -(-max_model_len // store.layout.block_size)
        self._orders = Orders(self.width, store.layout.block_size, max_model_len)
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._leaves, self._structure = jax.tree.flatten(state)
        self._everywhere = NamedSharding(mesh, P())
        self._last = self._put(np.zeros(self.max_seqs, np.int32))
        self._step = _make_step(graph, self._structure, mesh, backend, self.max_seqs)
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
        ints = jax.ShapeDtypeStruct((num_ints(shape, self.width),), jnp.int32, sharding=self._everywhere)
        out = (self.store.pages_sharding, self._everywhere, self._everywhere)
        step = jax.jit(self._step, static_argnums=4, donate_argnums=1, out_shardings=out)
        lowered = step.lower(self._leaves, self.store.pages, self._last, ints, (shape, self.width))
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        pages = self.store.nbytes // self.store.pages_sharding.num_devices
        if memory is not None and pages > 1 << 28 and self.backend != "reference":  # which is slow whatever it does
            temp, own = memory.temp_size_in_bytes, shape.tokens * BYTES_OF_TOKEN
            assert temp < pages // 2 + own, f"the step {shape} copies the pages: {temp=} bytes beside {pages=}"
        self._steps[shape] = compiled

    def _compile_sampler(self, name: str, rows: int) -> None:
        function, arguments = _SAMPLERS[name]
        shapes = arguments(self.vocab_size, rows, self.max_seqs, self.max_model_len)
        structs = [jax.ShapeDtypeStruct(shape, dtype, sharding=self._everywhere) for shape, dtype in shapes]
        jitted = jax.jit(function, out_shardings=self._everywhere)
        self._samplers[name, rows] = jitted.lower(*structs).compile()

    # -- running ----------------------------------------------------------------------------------------------

    def launch(self, plan: Plan) -> Flight:
        """Enqueue one step and return at once."""
        began = time.monotonic()
        order = self._orders.make(plan)
        ordered = time.monotonic()
        tokens, described = self.enqueue(order)
        if self._far:
            for array in (tokens, *(described or ())):
                array.copy_to_host_async()
        return Flight(plan, tokens, described, ordered - began, time.monotonic() - ordered)

    def enqueue(self, order: Order) -> tuple[jax.Array, tuple[jax.Array, ...] | None]:
        """Enqueue the step and the samplers that an order asks for: (tokens, what ``sampling.describe`` says)."""
        self.record(order)
        shape = order.shape
        if shape not in self._steps:
            self._compile_step(shape)  # only with warm-up switched off
        ints = self.store.argument(order.ints)
        self.store.pages, logits, tokens = self._steps[shape](self._leaves, self.store.pages, self._last, ints)
        if order.penalties is not None:
            *arrays, from_last = (self.store.argument(x) for x in order.penalties)
            logits = self._call("penalize", shape.seqs, logits, *arrays, self._last, from_last)
        if order.draw is not None:
            tokens = self._call("draw", shape.seqs, logits, *(self.store.argument(x) for x in order.draw), tokens)
        self._last = tokens
        return tokens, self._call("describe", shape.seqs, logits, tokens) if order.describe else None

    def _call(self, name: str, rows: int, *arrays: jax.Array | np.ndarray):
        if (name, rows) not in self._samplers:
            self._compile_sampler(name, rows)  # only with warm-up switched off
        return self._samplers[name, rows](*arrays)

    def _put(self, array: np.ndarray) -> jax.Array:
        return self.store.place(array, self._everywhere)


def _make_step(graph: nnx.GraphDef, structure, mesh: Mesh, backend: str, rows: int) -> Callable:
    """The traced step: (leaves, pages, last, ints, (shape, width)) -> (pages, logits [V, B], likeliest i32[rows])."""
    kernel = attention_backend(backend)
    # On a mesh of several devices XLA divides the products, which it cannot do with others' code.
    products = own_products(backend) if mesh.size == 1 else None

    def step(leaves, pages, last, ints, key: tuple[StepShape, int]):
        shape, width = key
        tokens, ragged, from_last = unpack(ints, shape, width)
        ends = jnp.maximum(ragged.starts[1:] - 1, 0)
        at = jnp.where(from_last >= 0, ends, shape.tokens)
        tokens = tokens.at[at].set(last[jnp.maximum(from_last, 0)], mode="drop", unique_indices=True)

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
        hints = HINTS.get(mesh.devices.flat[0].platform, {})
        ops, of_rows = Ops(attend, mix=mix_of(mesh, model.config), used=ragged.starts[-1], **hints), project
        if products is not None:
            own = functools.partial(products, used=ragged.starts[-1])
            ops = dataclasses.replace(ops, project=own, project_first=products)
            of_rows = functools.partial(products, used=jnp.sum(ragged.context > 0, dtype=jnp.int32))
        hidden, pages = model(tokens, ragged.positions, pages, ops)
        logits = model.logits(hidden[:, ends], of_rows)
        return pages, logits, _first_rows(sampling.greedy(logits), rows)

    return step


def _first_rows(tokens: jax.Array, rows: int) -> jax.Array:
    """i32[B] -> i32[rows], whatever B is, so that the next step always reads the same shape."""
    return jnp.zeros(rows, jnp.int32).at[: tokens.shape[0]].set(tokens)


def _draw(logits: jax.Array, floats: jax.Array, ints: jax.Array, greedy: jax.Array) -> jax.Array:
    return _first_rows(sampling.draw(logits, floats, ints), greedy.shape[0])


def _describe(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
    return sampling.describe(logits, tokens[: logits.shape[1]])


_SAMPLERS: dict[str, tuple[Callable, Callable[[int, int, int, int], list]]] = {
    "draw": (
        _draw,
        lambda v, b, r, m: [((v, b), jnp.float32), ((3, b), jnp.float32), ((4, b), jnp.int32), ((r,), jnp.int32)],
    ),
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
