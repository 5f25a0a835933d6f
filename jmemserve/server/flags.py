"""The command line of ``python -m jmemserve.serve``, and the file of ``--config``: one table for both. Pure."""

import argparse
import dataclasses
import difflib
import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from jmemserve.config import (
    AttentionBackend,
    BlockLayout,
    Bypass,
    Caching,
    ClusterSpec,
    EngineConfig,
    Granularity,
    InstanceSpec,
    LoadFormat,
    Policy,
    PromptTrees,
    Quantization,
    Role,
    SwapPolicy,
    Switch,
    Warmup,
    parse_instance,
    parse_mesh,
)
from jmemserve.errors import ConfigError

OFF = "off"


def default_cache_dir() -> str:
    """Where compiled steps are kept between starts."""
    return str(Path.home() / ".cache" / "jmemserve" / "xla")


class Processes(enum.Enum):
    """Where the instances of ``--mesh`` live."""

    ONE = "one"  # all in this process
    PER_INSTANCE = "per-instance"  # each in one of its own, started and watched by this one


class ProcessRole(enum.Enum):
    """What this process is, if not a whole server."""

    FRONTEND = "frontend"  # requests, and instances that join it, or the front-end that it joins
    PREFILL = "prefill"  # the others: one instance, which joins a front-end
    DECODE = "decode"
    COLOCATED = "colocated"


@dataclasses.dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything that the command line says."""

    cluster: ClusterSpec
    mesh: str  # as it was written
    served_model_name: str
    host: str
    port: int  # 0: any free one
    shutdown_timeout_s: float
    processes: Processes = Processes.ONE
    role: ProcessRole | None = None  # None: a whole server
    join: str | None = None  # the front-end's address, for an instance or a second front-end
    instance: InstanceSpec | None = None  # of an instance; without a name the front-end gives it one
    listen: str = "127.0.0.1:0"  # where an instance's peers reach it
    advertise: str | None = None  # what they dial instead
    secret_file: str | None = None
    ends_with_stdin: bool = False
    coordinator: str | None = None  # of an instance that has several processes
    num_processes: int | None = None
    process_id: int | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


@dataclasses.dataclass(frozen=True, slots=True)
class _Flag:
    """One setting: ``--max-model-len`` on the command line, ``max_model_len`` or ``max-model-len`` in a file."""

    name: str
    kind: type
    default: Any
    help: str
    field: str = ""  # where EngineConfig keeps it

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    def parse(self, value: Any) -> Any:
        """The value of a text or a YAML scalar. Raises ConfigError that says what it must be."""
        if value is None:
            return self.default
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ConfigError(f"{self.option} must be {self._expected()}, not {value!r}")
        try:
            return self.kind(str(value))
        except ValueError:
            raise ConfigError(f"{self.option} must be {self._expected()}, not {value!r}") from None

    def _expected(self) -> str:
        if issubclass(self.kind, enum.Enum):
            return "one of " + ", ".join(str(member.value) for member in self.kind)
        return {int: "a whole number", float: "a number"}.get(self.kind, "a text")


def _engine_flag(name: str, kind: type, help: str, kept_as: str = "") -> _Flag:
    """A flag whose default is that of EngineConfig."""
    field = next(field for field in dataclasses.fields(EngineConfig) if field.name == (kept_as or name))
    return _Flag(name, kind, field.default, help, field.name)


_ENGINE = (
    _engine_flag("model", str, "'demo', a Hugging Face folder, or a folder written by jmemserve.convert"),
    _engine_flag("load_format", LoadFormat, "where weights come from; dummy: random, for benchmarks"),
    _engine_flag("dtype", str, "of weights and KV: auto, float32, bfloat16 or float16"),
    _engine_flag(
        "quantization", Quantization, "round weights to 8 bits while loading; auto: as the checkpoint has them"
    ),
    _engine_flag("seed", int, "of dummy weights, and of requests that name no seed"),
    _engine_flag("max_model_len", int, "tokens of prompt and output together; default: what the checkpoint allows"),
    _engine_flag("block_size", int, "tokens per KV block"),
    _engine_flag("memory_utilization", float, "share of device memory for weights and KV together"),
    _engine_flag("kv_cache_tokens", int, "size of the KV pool in tokens, instead of --memory-utilization"),
    _engine_flag("host_memory_gb", float, "KV in host memory, in GiB per instance; 0: none"),
    _engine_flag("swap", SwapPolicy, "use host memory while it costs less than computing again, or always"),
    _engine_flag("attention", AttentionBackend, "who computes paged attention"),
    _engine_flag("block_layout", BlockLayout, "how KV pages lie in device memory"),
    _engine_flag("transfer_granularity", Granularity, "how the bytes of moving blocks are cut"),
    _engine_flag("caching", Caching, "who keeps KV for later requests; full: decode-made KV goes back to prefill"),
    _engine_flag("bypass", Bypass, "prefill short uncached prompts where they will be decoded"),
    _engine_flag("policy", Policy, "how instances are chosen for a request; cost: the fewest seconds, predicted"),
    _engine_flag("prompt_trees", PromptTrees, "how the router knows what is cached where; events: the pools tell"),
    _engine_flag("prompt_tree_ttl_s", float, "seconds that an entry lasts, with --prompt-trees responses"),
    _engine_flag("block_checksums", Switch, "compare the bytes of moved blocks with what they were"),
    _engine_flag("salt_quota_tokens", int, "cached tokens per cache salt in device memory; default: any"),
    _engine_flag("salt_quota_host_tokens", int, "cached tokens per cache salt in host memory; default: any"),
    _engine_flag("max_num_seqs", int, "sequences in one step of an instance"),
    _engine_flag("max_num_batched_tokens", int, "new tokens in one step of an instance"),
    _engine_flag("max_queue", int, "waiting requests before new ones are refused"),
    _engine_flag("max_queue_per_tenant", int, "waiting requests of one tenant before its new ones are refused"),
    _engine_flag("max_queue_delay", float, "refuse at once what waits longer for a first token", "max_queue_delay_s"),
    _engine_flag("tenant_weights", str, "shares of the service, NAME=WEIGHT,NAME=WEIGHT; of all others: 1"),
    _engine_flag("heartbeat_timeout_s", float, "seconds of silence after which an instance is dead"),
    _engine_flag("warmup", Warmup, "what is compiled before the server is ready"),
    _engine_flag("calibrate_s", float, "seconds to measure what steps cost, before the server is ready; 0: off"),
    _Flag(
        "compilation_cache_dir",
        str,
        default_cache_dir(),
        f"keeps compiled steps between starts; {OFF!r}: none",
        "compilation_cache_dir",
    ),
)
_SERVER = (
    _Flag("mesh", str, None, "instances joined by '+', each [COUNTx]ROLE[:model=SIZE] (default: prefill+decode)"),
    _Flag("processes", Processes, Processes.ONE, "all instances in this process, or each in its own"),
    _Flag("role", ProcessRole, None, "be only a front-end, or only one instance that joins one; default: all"),
    _Flag("join", str, None, "HOST:PORT of the front-end; of the primary one, for a second --role frontend"),
    _Flag("name", str, None, "name of this instance in the cluster; default: the front-end gives it one"),
    _Flag("listen", str, "127.0.0.1:0", "HOST:PORT where other instances reach this one; port 0: any free one"),
    _Flag("advertise", str, None, "HOST:PORT that other instances dial instead of --listen"),
    _Flag(
        "coordinator", str, None, "HOST:PORT of process 0 of an instance that has several; default: as Slurm etc. say"
    ),
    _Flag("num_processes", int, None, "how many processes this instance has; 1: no others, whatever Slurm etc. say"),
    _Flag("process_id", int, None, "which of them this is, from 0; process 0 joins the front-end"),
    _Flag("secret_file", str, None, "what all processes of the cluster know; default: ~/.cache/jmemserve/secret"),
    _Flag("ends_with_stdin", Switch, Switch.OFF, "end when standard input does, for supervisors"),
    _Flag("served_model_name", str, None, "name that clients may give; default: --model's last part"),
    _Flag("host", str, "127.0.0.1", "address to listen on"),
    _Flag("port", int, 50051, "port to listen on; 0: any free one"),
    _Flag("shutdown_timeout", float, 30.0, "seconds that requests in flight get to finish on SIGTERM or Ctrl-C"),
)
_FLAGS = {flag.name: flag for flag in (*_ENGINE, *_SERVER)}


class _Parser(argparse.ArgumentParser):
    """Errors are ConfigError, not an exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_flags(argv: Sequence[str]) -> tuple[ServeConfig, bool]:
    """The configuration, and whether it is only to be printed. Raises ConfigError; ``--help`` exits."""
    parser = _Parser("python -m jmemserve.serve", description="Serve a model over gRPC.", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same settings; flags win over it")
    parser.add_argument("--print-config", action="store_true", help="print every setting as YAML, and end")
    _add_flags(parser, _FLAGS.values())
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:
        options = [flag.option for flag in _FLAGS.values()] + ["--config", "--print-config", "--help"]
        raise ConfigError(f"there is no flag {unknown[0]!r}{_did_you_mean(unknown[0].split('=')[0], options)}")
    given = vars(known)
    path, only_print = given.pop("config"), given.pop("print_config")
    return _make_config({**(read_config_file(Path(path)) if path else {}), **given}), only_print


def add_engine_flags(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Offer the engine's settings on the command line of a tool: what is given goes to ``make_engine_config``."""
    _add_flags(parser, [flag for flag in _ENGINE if flag.name not in without])


def _add_flags(parser: argparse.ArgumentParser, flags: Iterable[_Flag]) -> None:
    for flag in flags:
        default = "" if flag.default is None else f" (default: {_plain(flag.default)})"
        choices = f" {{{','.join(str(m.value) for m in flag.kind)}}}" if issubclass(flag.kind, enum.Enum) else ""
        text = (flag.help + choices + default).replace("%", "%%")
        parser.add_argument(flag.option, dest=flag.name, default=argparse.SUPPRESS, metavar=_metavar(flag), help=text)


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, by the names with underscores. Raises ConfigError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold settings, one 'name: value' per line")
    settings: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in _FLAGS:
            raise ConfigError(f"--config {path}: there is no setting {str(key)!r}{_did_you_mean(name, _FLAGS)}")
        if name in settings:
            raise ConfigError(f"--config {path}: {name} is set twice")
        settings[name] = value
    return settings


def dump_config(config: ServeConfig) -> str:
    """YAML that ``--config`` reads back to the same configuration."""
    engine = config.cluster.engine
    values = _engine_values(engine)
    values |= {"mesh": config.mesh or None, "served_model_name": config.served_model_name, "host": config.host}
    values |= {"port": config.port, "shutdown_timeout": config.shutdown_timeout_s}
    values |= {"processes": config.processes.value, "role": None if config.role is None else config.role.value}
    values |= {"join": config.join, "name": (config.instance.name or None) if config.instance else None}
    values |= {"listen": config.listen, "advertise": config.advertise, "secret_file": config.secret_file}
    values |= {name: getattr(config, name) for name in ("coordinator", "num_processes", "process_id")}
    values["ends_with_stdin"] = "on" if config.ends_with_stdin else "off"
    return yaml.safe_dump(values, sort_keys=False)


def _engine_values(engine: EngineConfig) -> dict[str, Any]:
    values = {flag.name: _plain(getattr(engine, flag.field)) for flag in _ENGINE}
    return values | {"compilation_cache_dir": engine.compilation_cache_dir or OFF}


def engine_arguments(engine: EngineConfig) -> list[str]:
    """The command line that gives another process the same engine configuration."""
    values = _engine_values(engine)
    return [text for flag in _ENGINE if values[flag.name] is not None for text in (flag.option, str(values[flag.name]))]


def make_engine_config(settings: Mapping[str, Any]) -> EngineConfig:
    """An EngineConfig from named settings, as the command line would make it. Raises ConfigError."""
    names = [flag.name for flag in _ENGINE]
    for name in settings:
        if name not in names:
            raise ConfigError(f"there is no setting {name!r}{_did_you_mean(name, names)}")
    values = {
        flag.field: flag.parse(value.value if isinstance(value, enum.Enum) else value)
        for flag in _ENGINE
        for value in (settings.get(flag.name),)
    }
    if values["compilation_cache_dir"] == OFF:
        values["compilation_cache_dir"] = None
    return EngineConfig(**values)


def _make_config(settings: Mapping[str, Any]) -> ServeConfig:
    engine = make_engine_config({flag.name: settings[flag.name] for flag in _ENGINE if flag.name in settings})
    server = {flag.name: flag.parse(settings.get(flag.name)) for flag in _SERVER}
    if not 0 <= server["port"] <= 65535:
        raise ConfigError(f"--port must be from 0 to 65535, not {server['port']}")
    if not 0 <= server["shutdown_timeout"] <= 86400:
        raise ConfigError(f"--shutdown-timeout must be from 0 to 86400 seconds, not {server['shutdown_timeout']}")
    name = server["served_model_name"] or Path(engine.model).expanduser().resolve().name
    role, processes = server["role"], server["processes"]
    instance, mesh = None, server["mesh"] or "prefill+decode"
    if role in (None, ProcessRole.FRONTEND):
        for flag in ("join", "name", "coordinator", "num_processes", "process_id"):
            if server[flag] is not None and (flag, role) != ("join", ProcessRole.FRONTEND):
                option = _FLAGS[flag].option
                raise ConfigError(f"{option} is for one instance: give --role prefill, decode or colocated too")
        if role is ProcessRole.FRONTEND and (server["mesh"] is not None or processes is not Processes.ONE):
            raise ConfigError("--role frontend has no instances of its own: leave --mesh and --processes out")
        mesh = "" if role is ProcessRole.FRONTEND else mesh
        specs = parse_mesh(mesh) if mesh else ()
    else:
        if server["join"] is None:
            raise ConfigError(f"--role {role.value} needs --join HOST:PORT, the address of the front-end")
        mesh = server["mesh"] or "model=1"
        instance = parse_instance(mesh, Role(role.value), server["name"] or "")
        specs = (instance,)
    for flag in ("join", "listen", "advertise"):
        if server[flag] is not None and not re.fullmatch(r".+:\d{1,5}", server[flag]):
            raise ConfigError(f"--{flag} must be HOST:PORT, not {server[flag]!r}")
    return ServeConfig(
        ClusterSpec(specs, engine),
        mesh,
        name,
        server["host"],
        server["port"],
        server["shutdown_timeout"],
        processes,
        role,
        server["join"],
        instance,
        server["listen"],
        server["advertise"],
        server["secret_file"],
        server["ends_with_stdin"] is Switch.ON,
        server["coordinator"],
        server["num_processes"],
        server["process_id"],
    )


def _did_you_mean(name: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else "; --help lists them all"


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def _metavar(flag: _Flag) -> str:
    if issubclass(flag.kind, enum.Enum):
        return "KIND"
    return {int: "N", float: "X"}.get(flag.kind, "TEXT")
