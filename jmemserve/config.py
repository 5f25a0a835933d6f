"""What to build, parsed once: which instances on which devices, which model, how much memory.

Everything here is a frozen value without JAX in it. Errors are ConfigError and say what to change.
The mesh grammar (``--mesh``):

    MESH     = INSTANCES ("+" INSTANCES)*          prefill+decode
    INSTANCES = [COUNT "x"] ROLE [":" AXES]        2xprefill:model=1
    ROLE     = "prefill" | "decode" | "colocated"
    AXES     = SIZE | "model=" SIZE                decode:2  is short for  decode:model=2

Instances take devices in the order they are written, each as many as its axes multiply to.
"""

import dataclasses
import enum
import math
import re
from pathlib import Path

from jmemserve.errors import ConfigError
from jmemserve.kvpool.transfer.messages import Granularity

MAX_INSTANCES = 1024
MAX_WEIGHTS = 1024
DTYPES = ("float32", "bfloat16", "float16")  # of weights and KV
LEAST_WEIGHT = 0.001  # and the greatest is 1 / that


class Role(enum.Enum):
    """What the router prefers an instance to do. Any instance can catch up any sequence."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"

    @property
    def prefills(self) -> bool:
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL


class LoadFormat(enum.Enum):
    """Where the weights come from."""

    AUTO = "auto"  # by what the model folder holds
    SAFETENSORS = "safetensors"
    ORBAX = "orbax"
    DUMMY = "dummy"  # random, from the seed: for benchmarks


class Warmup(enum.Enum):
    """What is compiled before the server says it is ready."""

    FULL = "full"  # every shape: nothing is compiled afterwards
    FAST = "fast"  # the largest decode and prefill shapes only; others are never used
    NONE = "none"  # nothing: each shape is compiled when first met (for debugging)


class AttentionBackend(enum.Enum):
    """Who computes paged attention: the names of ``jmemserve.kernels``."""

    AUTO = "auto"  # the best that devices and model allow
    CPU = "cpu"  # our C++ library, with products of its own
    MOSAIC_AMPERE = "mosaic_ampere"  # kernels in Pallas for Ampere and Ada GPUs
    MOSAIC_GPU = "mosaic_gpu"  # kernels in Pallas for Hopper GPUs
    MOSAIC_MMA = "mosaic_mma"  # those of Ampere for Blackwell GPUs, and for Hopper at need
    TPU = "tpu"  # Pallas kernels for TPUs
    XLA = "xla"  # plain XLA operations: everywhere
    REFERENCE = "reference"  # the plainest way, for comparisons: slow


class Quantization(enum.Enum):
    """What the weights of products are rounded to, row by row."""

    AUTO = "auto"  # as the checkpoint has them
    INT8 = "int8"
    FP8 = "fp8"  # float8_e4m3fn


class BlockLayout(enum.Enum):
    """How the pages of all layers lie in device memory (paper section 5.2)."""

    AGGREGATED = "aggregated"  # one block is one contiguous page of all layers
    DISCRETE = "discrete"  # one array per layer


class Caching(enum.Enum):
    """Who keeps which keys and values for later requests: the milestones of paper section 5.1."""

    NONE = "none"  # nobody (PD-Basic)
    PREFILL = "prefill"  # prefill instances keep what they made (PD-Caching-1)
    DELTA = "delta"  # decode instances too, so that only what they lack moves (PD-Caching-2)
    FULL = "full"  # and what decode instances made goes back to prefill instances (PD-Caching-3)

    def keeps(self, role: Role) -> bool:
        """Whether an instance of this role keeps a prefix cache."""
        if role is Role.DECODE:
            return self in (Caching.DELTA, Caching.FULL)
        return self is not Caching.NONE

    @property
    def returns(self) -> bool:
        """Whether what decode instances made goes back."""
        return self is Caching.FULL


class Bypass(enum.Enum):
    """Whether a prompt whose uncached part is short may be prefilled where it will be decoded."""

    AUTO = "auto"  # when the cost model says that this is done sooner
    OFF = "off"


class Policy(enum.Enum):
    """How the router chooses instances for a request: see ``scheduler.policies``."""

    COST = "cost"  # the fewest seconds, predicted
    LONGEST_PREFIX = "longest_prefix"
    SESSION = "session"
    LEAST_LOAD = "least_load"
    ROUND_ROBIN = "round_robin"


class PromptTrees(enum.Enum):
    """How the router learns which prefixes instances hold."""

    EVENTS = "events"  # their pools tell
    RESPONSES = "responses"  # from what was answered; entries end after a time (paper section 6)


class SwapPolicy(enum.Enum):
    """When keys and values are swapped out to host memory and in again, rather than forgotten and computed again."""

    AUTO = "auto"  # while that is measured to cost less
    ALWAYS = "always"


class Switch(enum.Enum):
    """On or off."""

    ON = "on"
    OFF = "off"


@dataclasses.dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One model on one device mesh."""

    name: str  # role and number, for example "prefill0"; unique in the cluster
    role: Role
    model_axis: int  # size of the mesh axis "model": tensor parallelism
    first_device: int  # its devices are first_device .. first_device + model_axis - 1

    @property
    def device_indices(self) -> range:
        return range(self.first_device, self.first_device + self.model_axis)


@dataclasses.dataclass(frozen=True, slots=True)
class EngineConfig:
    """How every instance of a cluster is built. Names are those of the command line (and vLLM's, where it has one)."""

    model: str = "demo"  # "demo", a Hugging Face folder, or a folder written by jmemserve.convert
    load_format: LoadFormat = LoadFormat.AUTO
    dtype: str = "auto"  # auto or one of DTYPES
    quantization: Quantization = Quantization.AUTO
    seed: int = 0  # of dummy weights, and of requests that name none
    max_model_len: int | None = None  # tokens, prompt and output together; None: what the checkpoint allows
    block_size: int = 16  # tokens per block
    memory_utilization: float | None = None  # share of device memory for weights and KV together
    kv_cache_tokens: int | None = None  # size of the KV pool instead; at most one of the two
    host_memory_gb: float = 0.0  # DRAM of each instance's pool, in GiB; 0: none
    swap: SwapPolicy = SwapPolicy.AUTO
    attention: AttentionBackend = AttentionBackend.AUTO
    block_layout: BlockLayout = BlockLayout.AGGREGATED
    transfer_granularity: Granularity = Granularity.AUTO
    caching: Caching = Caching.FULL
    bypass: Bypass = Bypass.OFF
    policy: Policy = Policy.COST
    prompt_trees: PromptTrees = PromptTrees.EVENTS
    prompt_tree_ttl_s: float = 300.0  # with PromptTrees.RESPONSES
    block_checksums: Switch = Switch.ON  # compare the bytes of blocks that travel with what they were
    salt_quota_tokens: int | None = None  # cached tokens that each cache salt may have in device memory; None: any
    salt_quota_host_tokens: int | None = None  # the same in host memory
    max_num_seqs: int = 16  # sequences in one step
    max_num_batched_tokens: int = 512  # new tokens in one step
    max_queue: int = 1024  # requests waiting in the whole cluster before new ones are refused
    max_queue_per_tenant: int | None = None  # the same of one tenant; None: any
    max_queue_delay_s: float | None = None  # predicted seconds until a first token above which it is refused; None: any
    tenant_weights: str | None = None  # "name=2,other=1"; of a tenant that is not named: 1
    heartbeat_timeout_s: float = 10.0  # an instance that was silent for so long is dead
    warmup: Warmup = Warmup.FULL
    calibrate_s: float = 2.0  # seconds to measure what steps cost, before serving; 0: not measured
    compilation_cache_dir: str | None = None  # None: off

    def __post_init__(self) -> None:
        def need(good: bool, sentence: str) -> None:
            if not good:
                raise ConfigError(sentence)

        need(
            self.dtype in ("auto", *DTYPES),
            f"--dtype must be auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not {self.dtype!r}",
        )
        size = self.block_size
        need(1 <= size <= 256 and size & (size - 1) == 0, f"--block-size must be a power of two up to 256, not {size}")
        for flag in ("max_num_seqs", "max_num_batched_tokens", "max_queue"):
            value = getattr(self, flag)
            need(1 <= value <= 1 << 20, f"--{flag.replace('_', '-')} must be from 1 to {1 << 20}, not {value}")
        need(
            self.max_num_batched_tokens > self.max_num_seqs,
            f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be above --max-num-seqs "
            f"({self.max_num_seqs}): every running sequence gets a token per step, and prompts need room beside them",
        )
        need(
            self.max_model_len is None or self.max_model_len >= 2,
            f"--max-model-len must be at least 2, not {self.max_model_len}",
        )
        need(
            self.memory_utilization is None or self.kv_cache_tokens is None,
            "give --memory-utilization or --kv-cache-tokens, not both",
        )
        need(
            self.memory_utilization is None or 0 < self.memory_utilization <= 1,
            f"--memory-utilization must be above 0 and at most 1, not {self.memory_utilization}",
        )
        need(
            self.kv_cache_tokens is None or self.kv_cache_tokens >= 2 * size,
            f"--kv-cache-tokens must be at least two blocks ({2 * size} tokens), not {self.kv_cache_tokens}",
        )
        need(
            0 <= self.host_memory_gb <= 1 << 20,
            f"--host-memory-gb must be 0 (none) or a size in GiB, not {self.host_memory_gb:g}",
        )
        need(
            0.5 <= self.heartbeat_timeout_s <= 3600,
            f"--heartbeat-timeout-s must be from 0.5 to 3600 seconds, not {self.heartbeat_timeout_s:g}",
        )
        need(
            0.1 <= self.prompt_tree_ttl_s <= 1e6,
            f"--prompt-tree-ttl-s must be from 0.1 to 1,000,000 seconds, not {self.prompt_tree_ttl_s:g}",
        )
        need(
            0 <= self.calibrate_s <= 3600,
            f"--calibrate-s must be from 0 (off) to 3600 seconds, not {self.calibrate_s:g}",
        )
        for flag in ("salt_quota_tokens", "salt_quota_host_tokens"):
            value = getattr(self, flag)
            need(value is None or value >= 0, f"--{flag.replace('_', '-')} must be 0 or more, not {value}")
        share, delay = self.max_queue_per_tenant, self.max_queue_delay_s
        need(share is None or share >= 1, f"--max-queue-per-tenant must be at least 1, not {share}")
        need(
            delay is None or 0 < delay <= 86400,
            f"--max-queue-delay must be above 0 and at most 86400 seconds, not {delay}",
        )
        measured = self.calibrate_s > 0 and self.warmup is not Warmup.NONE
        need(
            delay is None or measured,
            "--max-queue-delay goes by predicted seconds, so costs must be measured: leave out --calibrate-s 0 and "
            "--warmup none",
        )
        if self.tenant_weights is not None:
            parse_weights(self.tenant_weights)
        need(0 <= self.seed < 2**63, f"--seed must be from 0 to 2**63 - 1, not {self.seed}")


@dataclasses.dataclass(frozen=True, slots=True)
class ClusterSpec:
    """Every instance that a process is to have; none, if they join it."""

    instances: tuple[InstanceSpec, ...]
    engine: EngineConfig = EngineConfig()

    @property
    def num_devices(self) -> int:
        return sum(spec.model_axis for spec in self.instances)


_PART = re.compile(r"(?:(?P<count>\d+)x)?(?P<role>[a-z]+)(?::(?P<axes>.*))?", re.DOTALL)


def parse_mesh(text: str) -> tuple[InstanceSpec, ...]:
    """Parse the mesh grammar above. Raises ConfigError that names the part it cannot read."""
    specs: list[InstanceSpec] = []
    numbers: dict[Role, int] = {}
    device = 0
    for part in text.replace(" ", "").split("+"):
        match = _PART.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"--mesh {text!r}: cannot read {part!r}; write [COUNTx]ROLE[:model=SIZE], "
                "for example 2xprefill:model=1+decode:2"
            )
        try:
            role = Role(match["role"])
        except ValueError:
            roles = ", ".join(role.value for role in Role)
            raise ConfigError(f"--mesh {text!r}: {match['role']!r} is no role; the roles are {roles}") from None
        count = int(match["count"] or 1)
        if not 1 <= count <= MAX_INSTANCES - len(specs):
            raise ConfigError(f"--mesh {text!r}: from 1 to {MAX_INSTANCES} instances are possible, not {part!r}")
        size = _parse_axes(text, match["axes"])
        for _ in range(count):
            number = numbers.get(role, 0)
            numbers[role] = number + 1
            specs.append(InstanceSpec(f"{role.value}{number}", role, size, device))
            device += size
    if not any(spec.role.prefills for spec in specs):
        raise ConfigError(f"--mesh {text!r}: nothing can prefill; add a prefill or colocated instance")
    if not any(spec.role.decodes for spec in specs):
        raise ConfigError(f"--mesh {text!r}: nothing can decode; add a decode or colocated instance")
    return tuple(specs)


def parse_instance(text: str, role: Role, name: str) -> InstanceSpec:
    """One instance that has a process of its own: ``--mesh`` is its axes alone, "model=2" or "2"."""
    try:
        return InstanceSpec(name, role, _parse_axes(text, text), 0)
    except ConfigError:
        raise ConfigError(f"--mesh {text!r}: of one instance give its axes alone, for example model=2") from None


def _parse_axes(text: str, axes: str | None) -> int:
    """The size of the mesh axis "model"."""
    if axes is None:
        return 1
    name, _, size = axes.rpartition("=")
    if name not in ("", "model") or "," in axes:
        raise ConfigError(
            f"--mesh {text!r}: {axes!r} names an unknown axis; the only axis is model (tensor parallelism), "
            "and more instances are written COUNTxROLE"
        )
    if not size.isdecimal() or not 1 <= int(size) <= 1 << 16:
        raise ConfigError(f"--mesh {text!r}: the size in {axes!r} must be a positive whole number")
    return int(size)


def parse_weights(text: str) -> dict[str, float]:
    """The weights of tenants, "name=2,other=1". Raises ConfigError that names the part it cannot read."""
    weights: dict[str, float] = {}
    parts = text.split(",") if text.strip() else []
    if len(parts) > MAX_WEIGHTS:
        raise ConfigError(f"--tenant-weights names {len(parts)} tenants; {MAX_WEIGHTS} are possible")
    for part in parts:
        name, equals, number = part.strip().rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not equals or not name or not LEAST_WEIGHT <= weight <= 1 / LEAST_WEIGHT:
            raise ConfigError(
                f"--tenant-weights: cannot read {part!r}; write NAME=WEIGHT,NAME=WEIGHT with weights from "
                f"{LEAST_WEIGHT:g} to {1 / LEAST_WEIGHT:g}"
            )
        if name in weights:
            raise ConfigError(f"--tenant-weights names {name!r} twice")
        weights[name] = weight
    return weights


def demo_folder() -> Path:
    """The embedded demo checkpoint."""
    return Path(__file__).parent / "demo"
