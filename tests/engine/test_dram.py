"""The engine with a DRAM medium, block layouts and granularities: the same tokens, and nothing held at the end."""

import numpy as np
import pytest
from engine_driver import Driver, tiny_model
from oracle import naive_generate

from jmemserve.config import BlockLayout, LoadFormat, SwapPolicy, Switch, parse_mesh
from jmemserve.engine.mesh import make_mesh
from jmemserve.kvpool import Granularity
from jmemserve.models import load_config, weights
from jmemserve.types import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=10)
DRAM = {"host_memory_gb": 0.01, "swap": SwapPolicy.ALWAYS, "kv_cache_tokens": 160, "max_model_len": 100}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def truth(model):
    config = load_config(model)
    mesh = make_mesh(parse_mesh("colocated")[0], 1)
    graph, state = weights.load(model, LoadFormat.DUMMY, config, "float32", mesh, 0, lambda done, total: None)
    return lambda prompt, n: naive_generate(graph, state, config, list(prompt), n)


def make_prompts(num: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, int(rng.integers(20, 60))).tolist() for _ in range(num)]


@pytest.mark.parametrize(
    "mesh, changes",
    [
        ("colocated", {}),
        ("prefill+decode:model=2", {}),
        ("colocated", {"block_layout": BlockLayout.DISCRETE}),
    ],
)
def test_what_was_swapped_out_comes_back(model, truth, mesh: str, changes: dict) -> None:
    """Prompts that together need four times the HBM: in the second round they are found in DRAM."""
    prompts = make_prompts(9)
    expected = [truth(prompt, 10) for prompt in prompts]
    with Driver(model, mesh, **(DRAM | changes)) as driver:
        for _ in range(3):
            assert driver.generate(prompts, GREEDY) == expected
        stats = [instance.pool.stats() for instance in driver.instances.values()]
        assert stats[0].swapped_out > 20 and stats[0].swapped_in > 20 and stats[0].dram_hit_tokens > 80
        assert sum(load.compiles_after_warmup for load in driver.cluster.loads()) == 0


def test_preempted_sequences_come_back_from_dram(model, truth) -> None:
    """Long answers that cannot all be held at once: who gives up its blocks finds them again."""
    prompts = make_prompts(6)
    expected = [truth(prompt, 40) for prompt in prompts]
    with Driver(model, "colocated", **DRAM) as driver:
        assert driver.generate(prompts, SamplingParams(temperature=0, max_tokens=40)) == expected
        assert driver.cluster.loads()[0].preemptions > 0
        assert driver.instances["colocated0"].pool.stats().swapped_in > 0


def test_aborted_while_swapped_frees_everything(model) -> None:
    """Lesson 12: ended at any moment, also while its blocks are on their way between the media."""
    rng = np.random.default_rng(1)
    prompts = make_prompts(9)
    with Driver(model, "colocated", **DRAM) as driver:
        for number in range(4):
            outputs = [driver.submit(f"{number}.{i}", prompt, GREEDY) for i, prompt in enumerate(prompts)]
            for i in rng.permutation(len(prompts)).tolist():
                driver.cluster.abort(f"{number}.{i}") if rng.random() < 0.7 else None
                outputs[i].ended.wait(float(rng.exponential(0.01)))
            driver.finish(*outputs)
            driver.assert_nothing_held()


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("layout", list(BlockLayout))
def test_tokens_do_not_depend_on_how_blocks_lie_and_travel(model, truth, granularity, layout) -> None:
    prompts = make_prompts(3)
    with Driver(model, "prefill+decode:model=2", transfer_granularity=granularity, block_layout=layout) as driver:
        assert driver.generate(prompts, GREEDY) == [truth(prompt, 10) for prompt in prompts]
        assert sum(load.compiles_after_warmup for load in driver.cluster.loads()) == 0


def test_checksums_can_be_waived(model, truth) -> None:
    prompts = make_prompts(2)
    with Driver(model, "prefill+decode", block_checksums=Switch.OFF) as driver:
        assert driver.generate(prompts, GREEDY) == [truth(prompt, 10) for prompt in prompts]


def test_a_salts_quota_bounds_what_it_keeps(model, truth) -> None:
    prompts = make_prompts(4)
    with Driver(model, "colocated", salt_quota_tokens=32) as driver:
        for prompt in prompts:
            output = driver.submit(str(prompt[:3]), prompt, GREEDY, salt="a")
            driver.finish(output)
            assert output.tokens == truth(prompt, 10)
        assert driver.cluster.loads()[0].cached_blocks <= 8


def test_swapping_stops_where_it_costs_more_than_computing(model, truth) -> None:
    """A model so small that a block is computed faster than it is brought back: the tokens are the same."""
    prompts = make_prompts(9)
    expected = [truth(prompt, 10) for prompt in prompts]
    with Driver(model, "colocated", **(DRAM | {"swap": SwapPolicy.AUTO})) as driver:
        instance = driver.instances["colocated0"]
        for _ in range(2):
            assert driver.generate(prompts, GREEDY) == expected
        for _ in range(20):  # swaps have become slow
            instance.costs.swapped_in(1, 10.0)
        assert driver.generate(prompts, GREEDY) == expected
        before = instance.pool.stats()
        assert driver.generate(prompts, GREEDY) == expected
        after = instance.pool.stats()
        assert after.swapped_in == before.swapped_in and not instance.pool.swaps.enabled
