"""What work costs is measured before an instance serves, leaves no trace, and reaches the router."""

import dataclasses
import time
from pathlib import Path

import pytest
from engine_driver import Driver, tiny_model

from jmemserve import calibrate
from jmemserve.config import EngineConfig, LoadFormat, Warmup, parse_mesh
from jmemserve.engine.build import Parts, build, read_model_config
from jmemserve.engine.calibrating import calibrated, measure, scratch, time_prefill
from jmemserve.engine.compiles import CompileCounter
from jmemserve.engine.report import SilentReport
from jmemserve.kernels import pair_tile
from jmemserve.kvpool import Medium
from jmemserve.kvpool.transports.local import LocalExchange
from jmemserve.scheduler.cost_model import CostModel, Profile
from jmemserve.scheduler.messages import CostNews


class Lines(SilentReport):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def line(self, text: str) -> None:
        self.said.append(text)


def make_parts(folder: Path, mesh: str = "colocated", **changes: object) -> tuple[Parts, EngineConfig]:
    settings = {
        "model": str(tiny_model(folder)),
        "load_format": LoadFormat.DUMMY,
        "dtype": "float32",
        "block_size": 4,
        "kv_cache_tokens": 1024,
        "max_model_len": 128,
        "max_num_seqs": 2,
        "warmup": Warmup.FAST,
        "max_num_batched_tokens": 64,
        "host_memory_gb": 0.01,
        "calibrate_s": 0.3,
    }
    engine = EngineConfig(**(settings | changes))  # type: ignore[arg-type]
    spec = parse_mesh(mesh)[0]
    config = read_model_config(engine)
    return build(spec, engine, config, spec.model_axis, 1, LocalExchange(), SilentReport()), engine


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("model"))[0]


def test_measuring_leaves_no_trace_and_compiles_nothing(parts: Parts) -> None:
    pool, counter = parts.pool, CompileCounter()
    cached = pool.alloc_mem(3)
    pool.insert(list(range(12)), cached)
    pool.free_mem(cached)
    before, last = pool.stats(), pool.log.last if pool.log else 0
    profile = measure(parts, 0.5, "here")
    assert counter.count == 0
    counter.close()
    assert pool.stats() == before and (pool.log is None or pool.log.last == last)
    pool.check()
    assert {(tokens, seqs) for tokens, seqs, _ in profile.steps} == {(s.tokens, s.seqs) for s in parts.shapes}
    assert profile.tile == pair_tile(parts.runner.backend) and profile.about == "here"
    assert profile.swap_call_s + profile.swap_block_s > 0 < profile.transfer_call_s + profile.transfer_block_s
    assert Profile.from_json(profile.to_json()) == profile
    assert CostModel(profile).prefill_s(100, 0) > 0


def test_it_keeps_to_its_budget_and_runs_at_least_one_step(parts: Parts) -> None:
    began = time.perf_counter()
    profile = measure(parts, 1e-6)
    assert time.perf_counter() - began < 5
    assert CostModel(profile).prefill_s(100, 0) > 0  # from a single step, in proportion


def test_a_prefill_is_timed_as_it_would_be_served(parts: Parts) -> None:
    before = parts.pool.stats()
    assert time_prefill(parts, 120, 0) > 0 < time_prefill(parts, 120, 60)
    after = parts.pool.stats()
    assert (after.hbm, after.dram) == (before.hbm, before.dram) and parts.pool.caching
    parts.pool.check()


def test_scratch_takes_only_what_is_free(parts: Parts) -> None:
    taken = parts.pool.alloc_mem(parts.pool.free - 2)
    cached = parts.pool.stats().hbm.cached
    with scratch(parts.pool, 50) as blocks:
        assert len(blocks) == 2 and parts.pool.stats().hbm.cached == cached
    parts.pool.free_mem(taken)
    with scratch(parts.pool, 1 << 30, Medium.DRAM) as slots:
        assert len(slots) == parts.pool.stats().dram.capacity


def test_where_it_cannot_be_measured_a_line_says_so(parts: Parts, tmp_path: Path) -> None:
    report = Lines()
    assert calibrated(parts, "x", EngineConfig(calibrate_s=0), report) is parts and not report.said
    assert calibrated(parts, "x", EngineConfig(warmup=Warmup.NONE), report).profile is None
    assert "--warmup none" in report.said[0]
    own = calibrated(parts, "x", EngineConfig(calibrate_s=0.1), report)
    assert own.profile is not None and "prefill of 1,024 tokens" in report.said[-1]


def test_costs_reach_the_router_and_their_error_is_a_metric(tmp_path: Path) -> None:
    """On two meshes that hand over: both profiles arrive, are followed, and nothing is compiled for it."""
    with Driver(tiny_model(tmp_path), "prefill+decode:model=2", calibrate_s=0.2) as driver:
        router = driver.cluster._gateway.router
        for name, instance in driver.instances.items():
            assert router._instances[name].measured
            assert router._instances[name].costs.profile == instance.costs.profile is not None
        driver.generate([[1 + n] * 40 for n in range(6)], None)
        assert all(load.cost_error > 0 and load.compiles_after_warmup == 0 for load in driver.cluster.loads())
        decode = driver.instances["decode0"]
        news = decode.call(lambda: decode.costs._refiner._transfers)
        assert news and all(blocks > 0 and 0 < seconds < 60 for blocks, seconds in news)
        slower = dataclasses.replace(decode.costs.profile, pair_s=1.0)
        decode.call(lambda: decode._say(CostNews(slower)))
        [told] = [member.profile for member in driver.cluster.report().members if member.name == "decode0"]
        assert Profile.from_json(told) == slower, "what is reported follows"


def test_the_command_writes_a_profile_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, plot = tmp_path / "profile.json", tmp_path / "costs.png"
    flags = ["--budget-s", "3", "--max-model-len", "256", "--kv-cache-tokens", "1024", "--max-num-batched-tokens", "64"]
    assert calibrate.main([*flags, "--warmup", "fast", "--output", str(profile), "--plot", str(plot)]) == 0
    said = capsys.readouterr().out
    assert "operator level" in said and "decode step" in said
    assert "demo" in Profile.from_json(profile.read_text()).about
    assert plot.stat().st_size > 5_000


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--budget-s", "0"], "--budget-s must be above 0"),
        (["--warmup", "none"], "--warmup none"),
        (["--model", "/nowhere"], "there is no"),
        (["--output", "/nowhere/profile.json"], "no folder"),
        (["--mesh", "prefill+decode"], "--mesh"),
    ],
)
def test_the_command_says_what_is_wrong(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate.main(flags) == 2
    assert says in capsys.readouterr().err
