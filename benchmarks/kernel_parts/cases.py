"""What is measured: sizes that fit the device, our backends, and how a measurement is made."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import machine
import numpy as np

from jmemserve.kernels import BACKENDS, Moves, Ragged, attention_backend, block_moves, fold_of, own_products
from jmemserve.kernels.choice import Need, why_not
from jmemserve.kernels.pages import PageLayout
from jmemserve.kernels.rule import Rule

LAYERS = 4  # of the pages: a layer's part of a page is not next to that of the next page


class Skipped(Exception):
    """A measurement that is not possible here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What the device itself can do."""

    read_s: float  # bytes
    copy_s: float  # bytes read and bytes written
    flop_s: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement: ``bytes`` for what is bound by memory, ``flop`` for what is bound by computing."""

    part: str
    case: str
    by: str
    seconds: float
    bytes: float = 0.0
    flop: float = 0.0

    def share(self, peaks: Peaks) -> float:
        bandwidth = peaks.copy_s if self.part == "moves" else peaks.read_s
        return (self.bytes / bandwidth + self.flop / peaks.flop_s) / self.seconds

    def as_dict(self, peaks: Peaks) -> dict[str, object]:
        return dataclasses.asdict(self) | {"of_peak": self.share(peaks)}


@dataclasses.dataclass(frozen=True)
class Heads:
    """Of one model."""

    name: str
    kv_heads: int
    group: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes, types and backends of a run."""

    platform: str
    dtype: str
    repeats: int
    heads: tuple[Heads, ...]
    decode: tuple[tuple[int, int], ...]  # (batch, context)
    prefill: tuple[int, ...]  # tokens
    blocks: tuple[int, ...]  # tokens per block
    moves: tuple[int, ...]  # blocks
    products: tuple[tuple[int, int, int], ...]  # (rows, depth, columns)
    backends: tuple[str, ...]

    @staticmethod
    def of_device(dtype: str | None, repeats: int, quick: bool, backends: str | None) -> "Setting":
        platform = jax.default_backend()
        names = tuple(backends.split(",")) if backends else tuple(name for name in BACKENDS if name != "reference")
        unknown = [name for name in names if name not in BACKENDS]
        if unknown:
            raise SystemExit(f"--backends takes {', '.join(BACKENDS)}, not {', '.join(unknown)}")
        own = functools.partial(Setting, platform, dtype or ("float32" if platform == "cpu" else "bfloat16"))
        if quick:
            tiny = Heads("tiny", 2, 2, 64)
            return own(1, (tiny,), ((2, 40),), (32,), (16,), (4,), ((64, 64, 4),), names)
        if platform == "cpu":
            heads = Heads("125M", 4, 3, 64), Heads("8B", 8, 4, 128)
            decode, moves = ((1, 1024), (8, 1024), (16, 256), (2, 8192)), (16, 64)
            products = tuple((768 * 4, 768, columns) for columns in (1, 8, 64, 512))
            return own(repeats, heads, decode, (256, 1024, 2048), (16, 64), moves, products, names)
        heads = Heads("8B", 8, 4, 128), Heads("13B", 40, 1, 128), Heads("1B", 8, 4, 64)
        decode = (1, 8192), (1, 32768), (8, 8192), (8, 32768), (64, 1024), (64, 4096), (256, 1024)
        return own(repeats, heads, decode, (512, 2048, 8192, 16384), (16, 64, 128), (64, 512), (), names)

    def peaks(self) -> Peaks:
        big = 256 if self.platform == "cpu" else 2048
        if self.repeats == 1:
            big = 8
        size = 256 if self.repeats == 1 else 1024 if self.platform == "cpu" else 8192
        read, copy = machine.read_bandwidth(big, self.repeats), machine.copy_bandwidth(big, self.repeats)
        return Peaks(read, copy, machine.matmul_rate(size, self.repeats, self.dtype))

    def times(self, part: str, context: int) -> int:
        """How often a kernel runs in one program: on CPU once where it takes so long that starting it is nothing."""
        if self.repeats == 1 or (self.platform == "cpu" and part == "prefill" and context >= 1024):
            return 1
        return 4 if part == "prefill" else 10

    def need(self, heads: Heads, block: int) -> Need:
        kind = jax.devices()[0].device_kind
        sizes = heads.kv_heads, heads.group, heads.head_dim
        return Need(self.platform, kind, self.dtype, *sizes, block, LAYERS)


def runs(part: str, setting: Setting) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Everything of one part by name, to be called one after the other: first all that has the smallest blocks."""
    if part == "products":
        yield from _products(setting)
        return
    for block in setting.blocks:
        for heads in setting.heads:
            yield from _moves(setting, heads, block) if part == "moves" else _attentions(part, setting, heads, block)


def _products(setting: Setting) -> Iterator[tuple[str, Callable[[], Row]]]:
    for rows, depth, columns in setting.products:
        for name in ("", *(name for name in setting.backends if own_products(name) is not None)):
            run = functools.partial(_product, setting, rows, depth, columns, name)
            yield f"{name or 'xla'}, {rows} x {depth}, {columns} columns", run


def _moves(setting: Setting, heads: Heads, block: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    ways = block_moves(jax.sharding.Mesh(jax.devices()[:1], ("model",)))
    for count in setting.moves:
        for way in ("gather", "scatter"):
            for by, moves in reversed(ways.items()):
                run = functools.partial(_move, setting, heads, block, count, way, by, moves)
                yield f"{by}, {way} {count} blocks of {block}, {heads.name}", run


def _attentions(part: str, setting: Setting, heads: Heads, block: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    from kernel_parts import others

    for batch, context in setting.decode if part == "decode" else [(1, tokens) for tokens in setting.prefill]:
        case = f"{heads.name} {batch} x {context:,}"
        for name in setting.backends:
            run = functools.partial(_attend, part, setting, heads, block, batch, context, name)
            yield f"{name}, {case} in {block}", run
        if block == setting.blocks[0]:  # they have blocks of their own, or none
            for name in others.ALL:
                yield f"{name}, {case}", functools.partial(others.measure, name, part, setting, heads, batch, context)


def work_of(part: str, setting: Setting, heads: Heads, batch: int, context: int) -> dict[str, float]:
    """Bytes of decoding, or FLOP of prefilling one row."""
    if part == "decode":
        item = jnp.dtype(setting.dtype).itemsize
        return {"bytes": 2.0 * item * batch * context * heads.kv_heads * heads.head_dim}
    return {"flop": 4.0 * context * (context + 1) / 2 * heads.kv_heads * heads.group * heads.head_dim}


def repeated(step: Callable, times: int) -> Callable:
    """A program that takes (carry, *rest), and gives step's first result back to it so often."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry, *rest):
        return jax.lax.fori_loop(0, times, lambda _, now: step(now, *rest), carry)

    return run


def seconds_of(run: Callable, carry, rest: tuple, times: int, repeats: int) -> float:
    """Median seconds of one of the ``times`` steps in ``run``."""
    held = [carry]

    def once():
        held[0] = run(held[0], *rest)
        return held[0]

    return machine.median_seconds(once, repeats) / times


def make_batch(setting: Setting, heads: Heads, block: int, batch: int, context: int, new: int, fold: int = 1):
    """(q, k, v, pages, ragged) of rows that have ``context`` tokens, ``new`` of them new; pages in random order."""
    rng = np.random.default_rng(0)
    width = -(-context // block)
    layout = PageLayout(LAYERS, heads.kv_heads, block, heads.head_dim, setting.dtype)
    page = (*layout.page_shape[:-2], block // fold, heads.head_dim * fold)
    few = jax.random.normal(jax.random.key(0), (16, *page), setting.dtype)  # random numbers for all would take longest
    pages = few[np.arange(1 + batch * width) % len(few)]
    tables = 1 + rng.permutation(batch * width).astype(np.int32).reshape(batch, width)
    place = np.tile(np.arange(context - new, context, dtype=np.int32), batch)
    row = np.repeat(np.arange(batch), new)
    ragged = Ragged(
        jnp.asarray(place),
        jnp.asarray(tables[row, place // block] * block + place % block),
        jnp.asarray(tables),
        jnp.full(batch, context, jnp.int32),
        jnp.arange(0, batch * new + 1, new, dtype=jnp.int32),
    )
    q = jnp.asarray(rng.normal(size=(batch * new, heads.kv_heads * heads.group, heads.head_dim)), setting.dtype)
    k, v = jnp.asarray(rng.normal(size=(2, batch * new, heads.kv_heads, heads.head_dim)), setting.dtype)
    return q, k, v, pages, ragged


def _attend(part: str, setting: Setting, heads: Heads, block: int, batch: int, context: int, name: str) -> Row:
    if (reason := why_not(name, setting.need(heads, block))) is not None:
        raise Skipped(f"{name}: {reason}")
    new = 1 if part == "decode" else context
    q, k, v, pages, ragged = make_batch(setting, heads, block, batch, context, new, fold_of(name, heads.head_dim))
    kernel, rule = attention_backend(name), Rule(heads.head_dim**-0.5)
    times = setting.times(part, context)

    def step(carry, k, v, ragged):
        out, pages = kernel(carry[0], k, v, carry[1], 1, ragged, rule)
        return out, pages

    seconds = seconds_of(repeated(step, times), (q, pages), (k, v, ragged), times, setting.repeats)
    case = (
        f"{heads.name} {batch} x {context:,} in {block}" if part == "decode" else f"{heads.name} {context:,} in {block}"
    )
    return Row(part, case, name, seconds, **work_of(part, setting, heads, batch, context))


def _move(setting: Setting, heads: Heads, block: int, count: int, way: str, by: str, moves: Moves) -> Row:
    layout = PageLayout(LAYERS, heads.kv_heads, block, heads.head_dim, setting.dtype)
    held = jnp.zeros((4 * count + 1, *layout.page_shape), setting.dtype)
    index = jnp.asarray(np.random.default_rng(0).permutation(4 * count)[:count].astype(np.int32) + 1)
    if way == "gather":
        gather = jax.jit(moves.gather_blocks)
        seconds = machine.median_seconds(lambda: gather(held, index), setting.repeats)
    else:
        blocks = jnp.ones((count, *layout.page_shape), setting.dtype)
        run = jax.jit(moves.scatter_blocks, donate_argnums=0)
        seconds = seconds_of(run, held, (index, blocks), 1, setting.repeats)
    moved = 2.0 * count * layout.bytes_per_block
    return Row("moves", f"{way} {count} of {layout.bytes_per_block >> 10:,} KiB", by, seconds, bytes=moved)


def _product(setting: Setting, rows: int, depth: int, columns: int, name: str) -> Row:
    if name and (reason := why_not(name, setting.need(setting.heads[0], setting.blocks[0]))) is not None:
        raise Skipped(f"{name}: {reason}")
    product = own_products(name) if name else None
    weight = jax.random.normal(jax.random.key(0), (rows, depth), setting.dtype)
    weights = [weight + number for number in range(1 if rows < 100 else 12)]  # more than caches hold
    x = jax.random.normal(jax.random.key(1), (depth, columns), setting.dtype)
    used = jnp.int32(columns)

    @jax.jit
    def run(weights, x):
        if product is not None:
            return [product(weight, x, used) for weight in weights]
        return [jnp.einsum("nk,kt->nt", weight, x, preferred_element_type=jnp.float32) for weight in weights]

    seconds = machine.median_seconds(lambda: run(weights, x), setting.repeats) / len(weights)
    item = weights[0].dtype.itemsize
    if columns <= 16:
        work = {"bytes": float(rows * depth * item)}
    else:
        work = {"flop": 2.0 * rows * depth * columns}
    return Row("products", f"{rows:,} x {depth:,}, {columns:,} columns", name or "xla", seconds, **work)
