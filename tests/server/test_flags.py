"""The command line and the config file: what is read, what is refused, and that a printed file reads back."""

import re
from pathlib import Path

import pytest

from jmemserve import serve
from jmemserve.config import EngineConfig, LoadFormat, Warmup
from jmemserve.errors import ConfigError
from jmemserve.server.flags import dump_config, make_engine_config, parse_flags


def test_defaults() -> None:
    config, only_print = parse_flags([])
    assert not only_print and config.port == 50051 and config.host == "127.0.0.1" and config.is_loopback
    assert [spec.name for spec in config.cluster.instances] == ["prefill0", "decode0"]
    assert config.served_model_name == "demo" and config.shutdown_timeout_s == 30
    assert config.cluster.engine.compilation_cache_dir is not None


def test_every_flag() -> None:
    words = "--model /a/b/ --load-format dummy --dtype bfloat16 --seed 3 --max-model-len 64 --block-size 32 "
    words += "--kv-cache-tokens 4096 --max-num-seqs 8 --max-num-batched-tokens 128 --max-queue 5 --warmup fast "
    words += "--compilation-cache-dir off --mesh 2xcolocated --host 0.0.0.0 --port 0 --shutdown-timeout 1.5"
    config, _ = parse_flags(words.split())
    assert config.cluster.engine == EngineConfig(
        model="/a/b/",
        load_format=LoadFormat.DUMMY,
        dtype="bfloat16",
        seed=3,
        max_model_len=64,
        block_size=32,
        kv_cache_tokens=4096,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        max_queue=5,
        warmup=Warmup.FAST,
    )
    assert config.served_model_name == "b" and not config.is_loopback and config.port == 0
    assert config.shutdown_timeout_s == 1.5 and len(config.cluster.instances) == 2


@pytest.mark.parametrize(
    "words", ["", "--memory-utilization 0.5 --served-model-name x --max-model-len 9", "--warmup none"]
)
def test_a_printed_config_reads_back(tmp_path: Path, words: str) -> None:
    config, _ = parse_flags(words.split())
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert parse_flags(["--config", str(path)])[0] == config


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("max-num-seqs: 4\nblock_size: 8\nmax_model_len: null\n")
    engine = parse_flags(["--config", str(path), "--block-size=32"])[0].cluster.engine
    assert (engine.max_num_seqs, engine.block_size, engine.max_model_len) == (4, 32, None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--blok-size 8", "no flag '--blok-size'; did you mean --block-size?"),
        ("--max-model 8", "did you mean --max-model-len?"),
        ("--xyzzy", "--help lists them all"),
        ("stray", "no flag 'stray'"),
        ("--port x", "--port must be a whole number, not 'x'"),
        ("--port -1", "from 0 to 65535"),
        ("--port", "expected one argument"),
        ("--warmup slow", "--warmup must be one of full, fast, none"),
        ("--shutdown-timeout nan", "--shutdown-timeout must be"),
        ("--mesh prefill", "nothing can decode"),
        ("--block-size 3", "power of two"),
        ("--config /nowhere/at/all.yaml", "cannot be read"),
    ],
)
def test_refused_flags(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(words.split()) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("jmemserve: ") and "Traceback" not in said


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("blocksize: 8", "no setting 'blocksize'; did you mean block_size?"),
        ("- 1", "must hold settings"),
        ("a: [", "is not YAML"),
        ("port: true", "--port must be a whole number, not True"),
        ("port: [1]", "--port must be a whole number"),
        ("port: 1.5", "--port must be a whole number, not 1.5"),
        ("block-size: 8\nblock_size: 8", "set twice"),
    ],
)
def test_refused_files(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        parse_flags(["--config", str(path)])
    assert sentence in str(caught.value)


def test_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--print-config", "--port", "7"]) == 0
    assert "port: 7\n" in capsys.readouterr().out


def test_engine_settings_of_the_offline_class() -> None:
    assert make_engine_config(
        {"warmup": Warmup.NONE, "max_num_seqs": 2, "compilation_cache_dir": "off"}
    ) == EngineConfig(warmup=Warmup.NONE, max_num_seqs=2)
    with pytest.raises(ConfigError, match="did you mean max_num_seqs"):
        make_engine_config({"max_num_seq": 2})


@pytest.mark.parametrize(
    "argv",
    [
        ["--role", "frontend", "--port", "0"],
        ["--role", "decode", "--join", "host:1", "--mesh", "model=2", "--name", "d7", "--listen", "10.0.0.1:7000"],
        ["--role", "frontend", "--join", "host:1"],
        ["--role", "prefill", "--join", "h:1", "--coordinator", "h:2", "--num-processes", "2", "--process-id", "1"],
        ["--max-queue-delay", "2.5", "--max-queue-per-tenant", "10", "--tenant-weights", "a=2,b=0.5"],
        ["--mesh", "2xprefill+decode", "--processes", "per-instance", "--caching", "delta", "--bypass", "auto"],
    ],
)
def test_every_kind_of_process_reads_back_what_it_prints(argv: list[str], tmp_path: Path) -> None:
    config, _ = parse_flags(argv)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert parse_flags(["--config", str(tmp_path / "config.yaml")])[0] == config


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--join", "h:1"], "--join is for one instance: give --role"),
        (["--role", "decode"], "--role decode needs --join HOST:PORT"),
        (["--role", "decode", "--join", "nonsense"], "--join must be HOST:PORT, not 'nonsense'"),
        (["--role", "frontend", "--mesh", "colocated"], "leave --mesh and --processes out"),
        (["--role", "decode", "--join", "h:1", "--mesh", "2xdecode"], "of one instance give its axes alone"),
        (["--process-id", "1"], "--process-id is for one instance"),
        (["--caching", "ful"], "--caching must be one of none, prefill, delta, full, not 'ful'"),
        (["--max-queue-delay", "0"], "--max-queue-delay must be above 0 and at most 86400 seconds, not 0"),
        (["--max-queue-delay", "soon"], "--max-queue-delay must be a number, not 'soon'"),
        (["--max-queue-per-tenant", "0"], "--max-queue-per-tenant must be at least 1, not 0"),
        (["--tenant-weights", "a=b"], "--tenant-weights: cannot read 'a=b'; write NAME=WEIGHT"),
        (["--heartbeat-timeout-s", "0"], "--heartbeat-timeout-s must be from 0.5"),
    ],
)
def test_processes_that_make_no_sense_are_refused(argv: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        parse_flags(argv)
