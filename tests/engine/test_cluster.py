"""The engine against the plain truth, through every arrangement; and what must hold around it."""

import threading
import time

import numpy as np
import pytest
from engine_driver import Driver, tiny_model
from oracle import naive_generate

from jmemserve.config import LoadFormat, parse_mesh
from jmemserve.engine.mesh import make_mesh
from jmemserve.errors import DuplicateRequest, InvalidRequest, Overloaded, Unavailable
from jmemserve.models import load_config, weights
from jmemserve.types import FinishReason, SamplingParams

MESHES = ["colocated", "prefill+decode", "2xprefill+decode:model=2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def truth(model):
    """naive(prompt, n): greedy continuation by full recompute."""
    config = load_config(model)
    mesh = make_mesh(parse_mesh("colocated")[0], 1)
    graph, state = weights.load(model, LoadFormat.DUMMY, config, "float32", mesh, 0, lambda done, total: None)
    return lambda prompt, n: naive_generate(graph, state, config, list(prompt), n)


def make_prompts(seed: int, num: int = 9) -> list[list[int]]:
    """Prompts of all kinds of lengths, some with shared prefixes."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, 97, 30).tolist()
    prompts = []
    for _ in range(num):
        prefix = shared[: int(rng.choice([0, 7, 16, 30]))]
        prompts.append(prefix + rng.integers(0, 97, int(rng.integers(1, 40))).tolist())
    return prompts


GREEDY = SamplingParams(temperature=0, max_tokens=10)
SAMPLED = [
    SamplingParams(seed=1, max_tokens=9),
    SamplingParams(seed=2**62 + 5, temperature=0.7, top_k=5, max_tokens=9),
    SamplingParams(seed=3, top_p=0.8, min_p=0.01, max_tokens=9),
    SamplingParams(seed=4, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, max_tokens=9),
    SamplingParams(temperature=0, frequency_penalty=1.5, max_tokens=9),
    SamplingParams(seed=6, temperature=1.5, logprobs=3, max_tokens=9),
    SamplingParams(temperature=0, max_tokens=1),
    SamplingParams(seed=8, max_tokens=2),
    SamplingParams(seed=9, max_tokens=30),
]


@pytest.mark.parametrize(
    "mesh,changes",
    [
        ("colocated", {}),
        ("colocated", {"block_size": 16, "max_num_batched_tokens": 9}),
        ("colocated", {"block_size": 1, "kv_cache_tokens": 200}),  # too little memory for all: preemption
        ("prefill+decode", {}),
        ("prefill+decode", {"block_size": 8, "kv_cache_tokens": 160, "max_num_seqs": 3}),
        ("2xprefill+decode:model=2", {}),
    ],
)
def test_greedy_is_the_naive_truth(model, truth, mesh: str, changes: dict) -> None:
    prompts = make_prompts(1)
    expected = [truth(prompt, 10) for prompt in prompts]
    with Driver(model, mesh, **changes) as driver:
        assert driver.generate(prompts, GREEDY) == expected
        assert driver.generate(prompts[::-1], GREEDY) == expected[::-1]  # now mostly from the cache
        assert sum(load.compiles_after_warmup for load in driver.cluster.loads()) == 0


def test_sampled_tokens_are_equal_everywhere(model) -> None:
    prompts = make_prompts(2)
    answers = []
    for mesh, changes in [(MESHES[0], {}), (MESHES[0], {"max_num_seqs": 1}), (MESHES[1], {}), (MESHES[2], {})]:
        with Driver(model, mesh, **changes) as driver:
            answers.append(driver.generate(prompts, SAMPLED))
            assert driver.generate(prompts[:4], SAMPLED[:4]) == answers[-1][:4]
            assert sum(load.compiles_after_warmup for load in driver.cluster.loads()) == 0
    assert [len(tokens) for tokens in answers[0]] == [params.max_tokens for params in SAMPLED]
    for other in answers[1:]:
        assert other == answers[0]


@pytest.mark.parametrize("mesh", MESHES[:2])
def test_stop_ids_min_tokens_and_usage(model, truth, mesh: str) -> None:
    prompt = make_prompts(3)[0]
    full = truth(prompt, 12)
    stop = full[5]
    first = full.index(stop)
    with Driver(model, mesh) as driver:
        params = SamplingParams(temperature=0, max_tokens=12)
        output = driver.submit("a", prompt, params, stop_ids=frozenset([stop]))
        driver.finish(output)
        assert output.tokens == full[:first]
        assert output.end is not None and output.end.finish is FinishReason.STOP
        assert output.end.usage.prompt_tokens == len(prompt)
        assert output.end.usage.completion_tokens == first
        later = SamplingParams(temperature=0, max_tokens=12, min_tokens=12)
        output = driver.submit("b", prompt, later, stop_ids=frozenset([stop]))
        driver.finish(output)
        assert len(output.tokens) == 12 and stop not in output.tokens
        assert output.end is not None and output.end.usage.cached_tokens == (len(prompt) - 1) // 4 * 4
        timings = output.end.timings
        assert (timings.transfer_s > 0) == (mesh != "colocated"), timings
        assert 0 < timings.transfer_s + timings.first_token_s < 60 and timings.transfer_s <= timings.decode_s, timings


def test_logprobs(model) -> None:
    prompt = make_prompts(4)[0]
    with Driver(model, "prefill+decode") as driver:
        output = driver.submit("a", prompt, SamplingParams(temperature=0, max_tokens=6, logprobs=2))
        driver.finish(output)
    assert [about.token for about in output.logprobs] == output.tokens
    for about in output.logprobs:
        assert about.rank == 1 and len(about.top) == 2
        assert about.top[0][0] == about.token and about.top[0][1] == about.logprob <= 0


@pytest.mark.parametrize("mesh", MESHES)
def test_aborts_at_random_moments_free_everything(model, mesh: str) -> None:
    rng = np.random.default_rng(5)
    long = SamplingParams(temperature=0, max_tokens=90)
    with Driver(model, mesh) as driver:
        for round_number in range(3):
            prompts = make_prompts(round_number)
            ids = [f"{round_number}.{i}" for i in range(len(prompts))]
            outputs = {i: driver.submit(i, prompt, long) for i, prompt in zip(ids, prompts, strict=True)}
            for request_id in rng.permutation(list(outputs)).tolist():
                time.sleep(float(rng.exponential(0.01)))
                driver.cluster.abort(request_id)
            driver.finish(*outputs.values())
            for output in outputs.values():
                assert output.end is not None and output.end.finish in (FinishReason.ABORT, FinishReason.LENGTH)
            driver.assert_nothing_held()
        assert not driver.cluster.abort("nobody")


def test_deadlines_hold_while_waiting_and_while_running(model) -> None:
    with Driver(model, "prefill+decode") as driver:
        slow = SamplingParams(temperature=0, max_tokens=100)
        past = driver.submit("past", [1, 2, 3], slow, deadline=time.monotonic() - 1)
        soon = driver.submit("soon", [1, 2, 3], slow, deadline=time.monotonic() + 0.03)
        driver.finish(past, soon)
        for output in (past, soon):
            assert output.end is not None and output.end.finish is FinishReason.DEADLINE


def test_refusals_disturb_nobody(model) -> None:
    with Driver(model, "prefill+decode", max_queue=3) as driver:
        running = driver.submit("a", [5, 6, 7], SamplingParams(temperature=0, max_tokens=60))
        for prompt, word in (([], "empty"), ([97], "vocabulary"), ([-1], "vocabulary"), ([1] * 128, "128 tokens")):
            with pytest.raises(InvalidRequest, match=word):
                driver.cluster.submit(driver_request("x", prompt))
        with pytest.raises(DuplicateRequest):
            driver.cluster.submit(driver_request("a", [1]))
        with pytest.raises(InvalidRequest, match="temperature"):
            driver.cluster.submit(driver_request("x", [1], SamplingParams(temperature=float("nan"))))
        with pytest.raises(Overloaded) as caught:
            for number in range(200):
                driver.submit(f"flood{number}", [number % 97] * 40, SamplingParams(temperature=0, max_tokens=1))
        assert caught.value.retry_after_s > 0
        driver.finish(running, *(output for key, output in driver.outputs.items() if key != f"flood{number}"))
        assert len(running.tokens) == 60


def test_later_outputs_of_an_accepted_call_are_refused_by_nobody(model) -> None:
    long = SamplingParams(temperature=0, max_tokens=40)
    with Driver(model, "prefill+decode", max_queue=1) as driver:
        first = driver.submit("a:0", [1, 2, 3], long)
        others = [driver.submit(f"a:{i}", [1, 2, 3], long, follows="a:0") for i in range(1, 5)]
        with pytest.raises(Overloaded):
            driver.submit("b", [1])
        drained = threading.Thread(target=driver.cluster.drain, args=(60,))
        drained.start()
        while driver.cluster._accepting:
            time.sleep(0.001)
        others.append(driver.submit("a:5", [1, 2, 3], long, follows="a:0"))
        with pytest.raises(Unavailable):
            driver.submit("c", [1])
        drained.join()
        driver.finish(first, *others)
        assert all(output.tokens == first.tokens and len(output.tokens) == 40 for output in others)


def test_nobody_is_adopted_while_an_older_one_waits_for_blocks(model) -> None:
    """The decode instance has too little memory for all: who gave up its blocks gets them back before newcomers."""
    params = SamplingParams(temperature=0, max_tokens=60)
    with Driver(model, "2xprefill+decode", kv_cache_tokens=144, max_num_seqs=2) as driver:
        prompts = [[number] * 50 for number in range(12)]
        outputs = [driver.submit(f"r{i}", prompt, params) for i, prompt in enumerate(prompts)]
        driver.finish(*outputs)
        assert all(len(output.tokens) == 60 for output in outputs)
        assert sum(load.preemptions for load in driver.cluster.loads()) > 0


def driver_request(request_id: str, prompt: list[int], params: SamplingParams | None = None):
    from jmemserve.types import Request

    return Request(request_id, tuple(prompt), params or SamplingParams(max_tokens=4), 0)


def test_salts_share_nothing_and_reset_forgets(model) -> None:
    prompt = make_prompts(7)[0] + [1] * 8
    with Driver(model, "colocated") as driver:
        for request_id, salt, cached in [("a", "", False), ("b", "", True), ("c", "x", False), ("d", "x", True)]:
            output = driver.submit(request_id, prompt, salt=salt)
            driver.finish(output)
            assert output.end is not None and (output.end.usage.cached_tokens > 0) == cached, request_id
        assert driver.cluster.reset_prefix_cache()
        output = driver.submit("e", prompt)
        driver.finish(output)
        assert output.end is not None and output.end.usage.cached_tokens == 0


def test_drain_finishes_what_runs_and_refuses_the_rest(model) -> None:
    with Driver(model, "prefill+decode") as driver:
        output = driver.submit("a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=50))
        assert driver.cluster.drain(60)
        assert len(output.tokens) == 50
        with pytest.raises(Unavailable):
            driver.submit("b", [1])


def test_a_dead_instance_fails_its_requests_at_once(model) -> None:
    driver = Driver(model, "colocated")
    failures = []
    driver.cluster.on_failure = failures.append
    instance = driver.instances["colocated0"]

    def broken(plan):
        raise RuntimeError("the device is gone")

    instance.runner.launch = broken  # type: ignore[method-assign]
    output = driver.submit("a", [1, 2, 3])
    driver.finish(output, timeout_s=20)
    assert output.end is not None and output.end.finish is FinishReason.ERROR
    assert "the device is gone" in output.end.error
    assert driver.cluster.failure is failures[0]
    with pytest.raises(Unavailable):
        driver.submit("b", [1])
    driver.cluster.stop()
