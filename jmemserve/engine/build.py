"""Builds one instance: mesh, weights, pool, compiled steps. The order matters: what is left of memory is the pool's."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from jmemserve.config import (
    BlockLayout,
    Caching,
    EngineConfig,
    InstanceSpec,
    LoadFormat,
    Quantization,
    Role,
    SwapPolicy,
    Switch,
    Warmup,
    demo_folder,
)
from jmemserve.engine.compiles import CompileCounter
from jmemserve.engine.mesh import device_memory, make_mesh
from jmemserve.engine.report import Report
from jmemserve.engine.runner import Runner
from jmemserve.engine.selftest import check_arithmetic
from jmemserve.engine.world import smallest
from jmemserve.errors import ConfigError
from jmemserve.kernels import fold_of, stored_head
from jmemserve.kernels.choice import Need, choose
from jmemserve.kernels.pages import PageLayout
from jmemserve.kvpool import BlockPool, Flags, Granularity
from jmemserve.kvpool.arena import HostArena, make_arena
from jmemserve.kvpool.events import EventLog
from jmemserve.kvpool.store import PageStore, make_store
from jmemserve.kvpool.transports import Transport
from jmemserve.kvpool.transports.local import LocalExchange, LocalTransport
from jmemserve.models import ModelConfig, load_config, weights
from jmemserve.scheduler.cost_model import Profile
from jmemserve.scheduler.plan import StepShape, step_shapes

DEFAULT_UTILIZATION = 0.9  # share of an accelerator's memory for weights and pool
CPU_UTILIZATION = 0.25  # on CPU the default pool is small: the memory is shared with everything else


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """What an instance is made of."""

    runner: Runner
    pool: BlockPool
    arena: HostArena | None  # the DRAM of the pool, if it has any
    transports: tuple[Transport, ...]  # towards other instances
    granularity: Granularity
    flags: Flags  # of every transfer
    swap: SwapPolicy
    caching: Caching
    shapes: tuple[StepShape, ...]
    shapes_of: Callable[[Role], tuple[StepShape, ...]]  # what an instance of a role compiles
    max_model_len: int
    profile: Profile | None = None  # what work costs here, once that is measured


def model_folder(engine: EngineConfig) -> Path:
    """Where the model lies. Raises ConfigError when there is nothing there."""
    folder = demo_folder() if engine.model == "demo" else Path(engine.model).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model {engine.model!r}: there is no {folder / 'config.json'}; give a folder in Hugging Face form, one "
            "written by jmemserve.convert, or 'demo'"
        )
    return folder


def read_model_config(engine: EngineConfig) -> ModelConfig:
    """The model's config.json, checked against what is asked of it."""
    config = load_config(model_folder(engine))
    if engine.max_model_len is not None and engine.max_model_len > config.max_model_len:
        raise ConfigError(
            f"--max-model-len {engine.max_model_len} is more than the {config.max_model_len} positions that the "
            "checkpoint was made for"
        )
    config = config.for_lengths(engine.max_model_len or config.max_model_len)
    if engine.quantization is not Quantization.AUTO:
        try:
            config = config.round_weights(engine.quantization.value)
        except ConfigError as error:
            raise ConfigError(f"--quantization {engine.quantization.value}: {error}") from None
    return config


def resolve_dtype(engine: EngineConfig, config: ModelConfig) -> str:
    """``auto`` is float32 on CPU and the checkpoint's type elsewhere (bfloat16 for float16).

    Raises ConfigError for float16 if what the model computes does not fit.
    """
    if engine.dtype == "float16" and config.beyond_float16:
        raise ConfigError(
            f"--dtype float16: a {config.family} model computes numbers above float16's largest, 65,504; use bfloat16"
        )
    if engine.dtype != "auto":
        return engine.dtype
    if jax.default_backend() == "cpu" or config.dtype == "float32":
        return "float32"
    return "bfloat16"


def check_host_memory(engine: EngineConfig, num_instances: int) -> None:
    """Raise ConfigError if the machine has less memory than the pools may take of it."""
    wanted, have = (
        engine.host_memory_gb * num_instances,
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
    )
    if wanted > have:
        raise ConfigError(
            f"--host-memory-gb {engine.host_memory_gb:g} for each of {num_instances} instances is more than the "
            f"{have:.1f} GiB of this machine; lower it"
        )


def build(
    spec: InstanceSpec,
    engine: EngineConfig,
    config: ModelConfig,
    num_devices: int,
    epoch: int,
    exchange: LocalExchange,
    report: Report,
    more_ways: Callable[[PageStore], Sequence[Transport]] = lambda store: (),
) -> Parts:
    """Load, allocate and compile one instance. Raises ConfigError or CheckpointError.

    Instances with the same ``exchange`` can move blocks between each other; ``more_ways`` are transports to others.
    Where the mesh is of several processes each of them must call this, with the same arguments.
    """
    mesh = make_mesh(spec, num_devices)
    dtype = resolve_dtype(engine, config)
    attention = _choose_attention(engine, config, mesh, dtype, report)
    kind = dtype if config.quantized is None else f"{config.quantized.kind}, others {dtype}"
    with report.phase(f"{spec.name}: weights ({weights.num_bytes(config, dtype) / 1e6:,.1f} MB {kind})"):
        bar = report.bar(f"{spec.name}: weights", weights.num_bytes(config.stored, dtype), "B")
        done = 0

        def progress(now: int, total: int) -> None:
            nonlocal done
            bar.update(now - done)
            done = now

        folder = model_folder(engine)
        seed, form = engine.seed, engine.load_format
        graph, state = weights.load(folder, form, config, dtype, mesh, seed, progress)
        jax.block_until_ready(jax.tree.leaves(state))
        bar.close()
    aggregated = engine.block_layout is BlockLayout.AGGREGATED
    head = stored_head(attention, config.head_dim)
    if head != config.head_dim:
        report.line(f"    heads of {config.head_dim} take {head} in the KV pool, as {attention} wants them")
    sizes = (config.num_layers, config.num_kv_heads, engine.block_size, head)
    layout = PageLayout(*sizes, dtype, aggregated, fold_of(attention, config.head_dim))
    num_blocks, max_model_len = _pool_size(engine, config, layout, mesh, dtype)
    with report.phase(f"{spec.name}: KV pool ({num_blocks:,} blocks, {num_blocks * engine.block_size:,} tokens)"):
        store = make_store(layout, num_blocks, mesh)
        jax.block_until_ready(store.pages)
    for name, reason in store.moved_by.refused:
        report.line(f"    moves of blocks: not {name}: {reason}")
    report.line(f"    moves of blocks: {store.moved_by.name}")
    arena, dram_blocks = None, int(engine.host_memory_gb * (1 << 30)) // layout.bytes_per_block
    if engine.host_memory_gb and dram_blocks < 1:
        raise ConfigError(
            f"--host-memory-gb {engine.host_memory_gb:g} is less than one block of {layout.bytes_per_block:,} bytes"
        )
    if dram_blocks and jax.process_index() == 0:  # of several processes only the leader has one
        with report.phase(f"{spec.name}: host memory ({dram_blocks:,} blocks, {engine.host_memory_gb:g} GiB)"):
            arena = make_arena(layout, dram_blocks, store.piece_mesh)
    report.line(
        f"    room for {num_blocks * engine.block_size / max_model_len:.1f} sequences of {max_model_len:,} tokens, "
        f"{num_blocks * layout.bytes_per_block / 1e6:,.0f} MB"
    )
    # A single column is slower than two, one of them padding: XLA's bfloat16 product on CPU takes five times as long,
    # and for a GPU XLA makes a third more kernels.
    platform = mesh.devices.flat[0].platform
    slow_alone = platform == "gpu" or (platform == "cpu" and dtype == "bfloat16" and attention != "cpu")
    fewest_rows = 2 if slow_alone and engine.max_num_seqs > 1 else 1

    def shapes_of(role: Role) -> tuple[StepShape, ...]:
        most = engine.max_num_seqs, engine.max_num_batched_tokens
        shapes = step_shapes(role.decodes, role.prefills, *most, fewest_rows)
        return _largest_of_each_kind(shapes) if engine.warmup is Warmup.FAST else shapes

    shapes = shapes_of(spec.role)
    runner = Runner(graph, state, store, mesh, shapes, config.vocab_size, max_model_len, attention)
    if engine.warmup is not Warmup.NONE:
        programs = len(runner.programs())
        counter = CompileCounter()
        with report.phase(f"{spec.name}: compile {programs} programs"):
            bar = report.bar(f"{spec.name}: compile", programs, " programs")
            for _ in runner.compile_all(threads=max(2, min(8, os.cpu_count() or 2))):
                bar.update(1)
            if arena is not None:
                arena.warm_up(store.sharding, store.sizes)
            bar.close()
        counter.close()
        report.line(f"    {counter.seconds:.2f} s of compiling, by several threads at once")
        if engine.compilation_cache_dir is not None:
            report.line(f"    {counter.found} of {counter.count} compilations found in the cache")
    size = engine.block_size
    quota = tuple(
        tokens // size if tokens is not None else None
        for tokens in (engine.salt_quota_tokens, engine.salt_quota_host_tokens)
    )
    pool = BlockPool(
        spec.name,
        epoch,
        num_blocks,
        size,
        dram_blocks,
        model=model_identity(engine, config, dtype),
        quota=None if quota == (None, None) else (quota[0], quota[1]),
        log=EventLog(),
    )
    transports = (LocalTransport(exchange, store.checksums), *more_ways(store))
    flags = Flags.NONE if engine.block_checksums is Switch.ON else Flags.NO_CHECKSUM
    return Parts(
        runner,
        pool,
        arena,
        transports,
        engine.transfer_granularity,
        flags,
        engine.swap,
        engine.caching,
        shapes,
        shapes_of,
        max_model_len,
    )


def _choose_attention(engine: EngineConfig, config: ModelConfig, mesh: Mesh, dtype: str, report: Report) -> str:
    """The backend's name, after it has computed something right on a device of this mesh."""
    device = mesh.local_devices[0]
    rules = [config.rule(layer) for layer in range(config.num_layers)]
    need = Need(
        device.platform,
        device.device_kind,
        dtype,
        max(1, config.num_kv_heads // mesh.size),
        config.group,
        config.head_dim,
        engine.block_size,
        config.num_layers,
        engine.block_layout is BlockLayout.AGGREGATED,
        window=any(rule.window is not None for rule in rules),
        soft_cap=any(rule.soft_cap is not None for rule in rules),
    )
    off_by: dict[str, float] = {}

    def fails(name: str) -> str | None:
        try:
            off_by[name] = check_arithmetic(device, name, need)
        except Exception as error:  # on a device that nobody has tried a compiler may raise anything
            reason = str(error).partition("\n")[0] or type(error).__name__
            smallest(0)
            return reason
        return None if smallest(1) else "it fails in another process of this mesh"

    try:
        choice = choose(engine.attention.value, need, fails)
    except ValueError as error:
        raise ConfigError(f"--attention: {error}") from None
    for name, reason in choice.refused:
        report.line(f"    attention: not {name}: {reason}")
    report.line(f"    attention: {choice.name} (error beside numpy {off_by[choice.name]:.1g})")
    return choice.name


def model_identity(engine: EngineConfig, config: ModelConfig, dtype: str) -> str:
    """Equal for instances whose keys and values can stand for each other."""
    weights_of = f"{engine.load_format.value}-{engine.seed}" if engine.load_format is LoadFormat.DUMMY else "checkpoint"
    kind = dtype if config.quantized is None else f"{dtype}-{config.quantized.kind}"
    if config.rope.factors:  # which they are depends on --max-model-len
        kind += "-long" if config.rope.factors != config.rope.short_factors else "-short"
    return f"{model_folder(engine).resolve().name}/{weights_of}/{config.num_layers}x{config.hidden_size}/{kind}"


def model_facts(engine: EngineConfig, config: ModelConfig) -> tuple[tuple[str, str], ...]:
    """What must be equal in all instances of a cluster and in its front-end, as far as it is known before loading."""
    folder = model_folder(engine)

    def digest(name: str) -> str:
        path = folder / name
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else "none"

    return (
        ("config.json", digest("config.json")),
        ("tokenizer.json", digest("tokenizer.json")),
        ("vocabulary size", str(config.vocab_size)),
        ("--block-size", str(engine.block_size)),
        ("--caching", engine.caching.value),
    )


def _largest_of_each_kind(shapes: tuple[StepShape, ...]) -> tuple[StepShape, ...]:
    ones = [shape for shape in shapes if shape.tokens == shape.seqs]
    packed = [shape for shape in shapes if shape.tokens != shape.seqs]
    return tuple(sorted(max(kind) for kind in (ones, packed) if kind))


def _pool_size(
    engine: EngineConfig, config: ModelConfig, layout: PageLayout, mesh: jax.sharding.Mesh, dtype: str
) -> tuple[int, int]:
    """(blocks of the pool, longest sequence). The longest sequence must fit into the pool."""
    size = engine.block_size
    longest = engine.max_model_len or config.max_model_len
    if engine.kv_cache_tokens is not None:
        num_blocks = engine.kv_cache_tokens // size
    else:
        total, used = device_memory(mesh)
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        share = engine.memory_utilization or (CPU_UTILIZATION if on_cpu else DEFAULT_UTILIZATION)
        per_device = weights.num_bytes(config, dtype) // mesh.size
        room = share * total - (per_device if on_cpu else used)
        num_blocks = int(room * mesh.size / layout.bytes_per_block)
        if on_cpu and engine.memory_utilization is None:
            num_blocks = min(num_blocks, 2 * engine.max_num_seqs * -(-longest // size))
        num_blocks = smallest(num_blocks)  # every process measures its own devices
    if num_blocks < 2:
        raise ConfigError(
            f"after the weights there is no memory left for a KV pool ({num_blocks} blocks of "
            f"{layout.bytes_per_block:,} bytes); raise --memory-utilization or use more devices per instance"
        )
    if longest > num_blocks * size:
        if engine.max_model_len is not None:
            raise ConfigError(
                f"one sequence of --max-model-len {longest} tokens does not fit into a KV pool of {num_blocks * size} "
                "tokens; lower --max-model-len, or raise --kv-cache-tokens or --memory-utilization"
            )
        longest = num_blocks * size
    return num_blocks, longest
