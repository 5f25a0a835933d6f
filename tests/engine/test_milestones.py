"""Three kinds of instance, one answer: conversations through every milestone, granularity, mesh, tier, move and fault.

And what each milestone computes and moves, turn by turn (the arithmetic of the paper's table 4).
"""

import random
import threading
import time

import numpy as np
import pytest
from conversations import conversations
from engine_driver import Driver, tiny_model

from jmemserve.config import Bypass, Caching, Role, SwapPolicy, Warmup
from jmemserve.errors import JmemserveError
from jmemserve.kvpool import Granularity
from jmemserve.types import FinishReason, SamplingParams

ANSWER = 13  # tokens per turn
C = 4  # tokens per block
FAST = {"warmup": Warmup.FAST}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}  # so that four devices can share them
    return tiny_model(tmp_path_factory.mktemp("tiny"), **heads)


def talk(driver: Driver, turns: list[list[list[int]]], between=lambda: None, tag: str = "") -> list[list[list[int]]]:
    """All conversations at once, turn by turn, half of them greedy; the answers. ``between`` is called after a turn."""
    histories: list[list[int]] = [[] for _ in turns]
    answers: list[list[list[int]]] = [[] for _ in turns]
    for turn in range(len(turns[0])):
        outputs = []
        for number, history in enumerate(histories):
            history += turns[number][turn]
            how = {"temperature": 0.0} if number % 2 else {"temperature": 0.9, "top_p": 0.95, "seed": 7 * number + turn}
            params = SamplingParams(max_tokens=ANSWER, ignore_eos=True, **how)
            outputs.append(driver.submit(f"{tag}c{number}t{turn}", history, params))
        driver.finish(*outputs)
        for number, output in enumerate(outputs):
            assert output.end is not None and output.end.finish is FinishReason.LENGTH, output.end
            histories[number] += output.tokens
            answers[number].append(output.tokens)
        between()
    return answers


@pytest.fixture(scope="module")
def truth(model):
    """The answers of one colocated instance that caches nothing and runs one sequence at a time."""
    turns = conversations(4, 4)
    with Driver(model, "colocated", caching=Caching.NONE, max_num_seqs=1, **FAST) as driver:
        answers = talk(driver, turns)
        assert sum(load.prefix_hits for load in driver.cluster.loads()) == 0
    return turns, answers


@pytest.mark.parametrize(
    "mesh, settings",
    [
        ("colocated", {"caching": Caching.FULL}),
        ("prefill+decode", {"caching": Caching.NONE, "transfer_granularity": Granularity.BY_LAYER}),
        ("prefill+decode", {"caching": Caching.PREFILL, "transfer_granularity": Granularity.BY_REQUEST}),
        ("prefill+decode", {"caching": Caching.DELTA, "transfer_granularity": Granularity.BY_REQUEST_AGG}),
        ("prefill+decode", {"caching": Caching.FULL, "transfer_granularity": Granularity.BY_LAYER}),
        ("prefill+decode:model=2", {"caching": Caching.FULL}),
        ("prefill:model=2+decode", {"caching": Caching.FULL}),
        ("prefill:model=2+decode:model=4", {"caching": Caching.FULL}),
        ("prefill:model=4+decode:model=2", {"caching": Caching.DELTA, "block_size": 8}),
        ("2xprefill+2xdecode", {"caching": Caching.FULL, "bypass": Bypass.AUTO}),
        (
            "prefill+decode",
            {"caching": Caching.FULL, "kv_cache_tokens": 160, "host_memory_gb": 0.01, "swap": SwapPolicy.ALWAYS},
        ),
    ],
)
def test_every_arrangement_gives_the_same_answers(model, truth, mesh: str, settings: dict) -> None:
    turns, expected = truth
    with Driver(model, mesh, **(FAST | settings)) as driver:
        assert talk(driver, turns) == expected
        assert sum(load.compiles_after_warmup for load in driver.cluster.loads()) == 0


def test_moved_sequences_give_the_same_answers(model, truth) -> None:
    """Every running request is asked to move again and again while it runs."""
    turns, expected = truth
    with Driver(model, "prefill+3xdecode", **FAST) as driver:
        over = threading.Event()

        def keep_moving() -> None:
            while not over.is_set():
                for request_id in list(driver.outputs)[-len(turns) :]:
                    try:
                        driver.cluster.move(request_id)
                    except JmemserveError:  # it has ended, or is where it should go
                        pass
                time.sleep(0.02)

        mover = threading.Thread(target=keep_moving)
        mover.start()
        try:
            assert talk(driver, turns) == expected
        finally:
            over.set()
            mover.join()
        assert driver.cluster.report().moves > 10


def test_roles_change_while_requests_run(model, truth) -> None:
    turns, expected = truth
    roles = iter([("prefill0", Role.DECODE), ("decode0", Role.PREFILL), ("prefill0", Role.COLOCATED)])
    with Driver(model, "prefill+decode", **FAST) as driver:

        def switch() -> None:
            name, role = next(roles, (None, None))
            if name is not None:
                driver.cluster.set_role(name, role)
                limit = time.monotonic() + 60
                while {m.name: m.role for m in driver.cluster.report().members}[name] != role.value:
                    assert time.monotonic() < limit, f"{name} is not {role}"
                    time.sleep(0.01)

        assert talk(driver, turns, between=switch) == expected
        loads = driver.cluster.loads()
        assert sum(load.compiles_after_warmup for load in loads) == 0, "only what the roles need was compiled"
        hits = {load.instance: load.prefix_hits for load in loads}
        assert hits["decode0"] > 0, "what was cached by the decode instance serves it as a prefill instance"


def break_instance(driver: Driver, name: str) -> None:
    """Its thread dies, as of a bug."""

    def die() -> None:
        raise RuntimeError(f"{name} was broken by the test")

    driver.instances[name].post(die)


@pytest.mark.parametrize("mesh", ["2xprefill+2xdecode", "3xcolocated", "prefill+decode"])
def test_requests_go_on_when_instances_die(model, truth, mesh: str) -> None:
    """Instances die while requests run, until one is left; no token is lost, doubled or changed."""
    turns, expected = truth
    driver = Driver(model, mesh, **FAST)
    try:
        names = [member.name for member in driver.cluster.report().members]
        random.Random(0).shuffle(names)
        doomed = names[1:]

        def kill_soon() -> None:
            if doomed:
                name = doomed.pop()
                threading.Timer(0.02, break_instance, (driver, name)).start()

        kill_soon()
        assert talk(driver, turns, between=kill_soon) == expected
        report = driver.cluster.report()
        assert [member.state for member in report.members].count("dead") == len(names) - 1
        assert report.failed == 0
        survivor = driver.instances[names[0]]
        limit = time.monotonic() + 20
        while survivor.pool.held and time.monotonic() < limit:
            time.sleep(0.05)
        assert survivor.pool.held == 0, "blocks of the dead are freed"
        survivor.call(survivor.pool.check)
    finally:
        driver.cluster.stop()


def test_bfloat16_logits_agree_within_a_tolerance(model) -> None:
    """In bfloat16 shapes of steps may differ in the last bit; log probabilities agree within 0.05."""
    prompts = [list(range(5, 45)), list(range(60, 85))]
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    found = []
    for mesh in ("colocated", "prefill+decode"):
        with Driver(model, mesh, dtype="bfloat16", **FAST) as driver:
            outputs = [driver.submit(f"r{n}", prompt, params) for n, prompt in enumerate(prompts)]
            driver.finish(*outputs)
            again = [driver.submit(f"s{n}", prompt, params) for n, prompt in enumerate(prompts)]  # from the cache
            driver.finish(*again)
            found.append([dict(output.logprobs[0].top) for output in (*outputs, *again)])
    for one, other in zip(found[0], found[1], strict=True):
        shared = one.keys() & other.keys()
        assert len(shared) >= 3
        np.testing.assert_allclose([one[t] for t in shared], [other[t] for t in shared], atol=0.05)


# -- what each milestone computes and moves ---------------------------------------------------------------------------


def settle(driver: Driver) -> None:
    """Wait until nothing moves: what decode made has gone back."""
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        pools = driver.cluster.pools()
        if not any(pool.transfers_in or pool.transfers_out for pool in pools):
            return
        time.sleep(0.01)
    raise AssertionError("transfers do not end")


def moved(driver: Driver) -> tuple[int, int]:
    """Blocks that went (from P to D, back) so far."""
    per_block = driver.instances["prefill0"].node.store.layout.bytes_per_block
    out = {pool.instance: pool.bytes_out // per_block for pool in driver.cluster.pools()}
    return out["prefill0"], out["decode0"]


@pytest.mark.parametrize("granularity", [Granularity.BY_REQUEST_AGG, Granularity.BY_LAYER])
@pytest.mark.parametrize("caching", list(Caching))
def test_each_milestone_computes_and_moves_what_the_paper_says(model, caching: Caching, granularity) -> None:
    """Turn k has x_k = x_(k-1) + g + u tokens; all are rounded to whole blocks of C, as only those are cached."""
    user, turns, layers = 10, 5, 2
    with Driver(model, "prefill+decode", caching=caching, transfer_granularity=granularity, **FAST) as driver:
        history: list[int] = []
        before = (0, 0)
        cached_before = 0  # tokens in P's cache that the last turn left there
        calls_before = {pool.instance: pool.network_calls for pool in driver.cluster.pools()}
        at_decode = 0  # whole blocks that D has of the conversation
        for turn in range(turns):
            history += np.random.default_rng(turn).integers(0, 97, user).tolist()
            x = len(history)
            output = driver.submit(
                f"t{turn}", history, SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
            )
            driver.finish(output)
            settle(driver)
            assert output.end is not None
            history += output.tokens
            computed = x - output.end.usage.cached_tokens
            now = moved(driver)
            to_decode, back = now[0] - before[0], now[1] - before[1]
            whole, everything = x // C, (x + ANSWER - 1) // C  # the last token was never fed back
            blocks = -(-x // C)
            expected_computed = x if caching is Caching.NONE else x - cached_before
            assert computed == expected_computed, (turn, computed, expected_computed)
            expected_moved = blocks - (at_decode if caching in (Caching.DELTA, Caching.FULL) else 0)
            assert to_decode == expected_moved, (turn, to_decode, expected_moved)
            assert back == (everything - whole if caching is Caching.FULL else 0), (turn, back)
            calls = {pool.instance: pool.network_calls for pool in driver.cluster.pools()}
            per_block = 2 * layers if granularity is Granularity.BY_LAYER else 1
            assert calls["prefill0"] - calls_before["prefill0"] == to_decode * per_block
            assert calls["decode0"] - calls_before["decode0"] == back * per_block
            before, calls_before, at_decode = now, calls, everything
            cached_before = (everything if caching is Caching.FULL else whole) * C


def test_colocated_caching_is_on_or_off(model) -> None:
    prompt = list(range(40))
    for caching, expected in ((Caching.NONE, 0), (Caching.FULL, 36)):
        with Driver(model, "colocated", caching=caching, **FAST) as driver:
            driver.finish(driver.submit("a", prompt))
            again = driver.submit("b", prompt)
            driver.finish(again)
            assert again.end is not None and again.end.usage.cached_tokens == expected


# -- cancelling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["prefill+decode", "2xcolocated"])
def test_cancelled_at_any_moment_everything_is_freed(model, mesh: str) -> None:
    """Aborts after random times meet requests in every state; leaving the driver checks that nothing is held."""
    rng = random.Random(1)
    small = {"kv_cache_tokens": 256, "host_memory_gb": 0.01, "swap": SwapPolicy.ALWAYS, "max_num_seqs": 3}
    with Driver(model, mesh, **(FAST | small)) as driver:
        outputs = []
        for number in range(60):
            prompt = [rng.randrange(97) for _ in range(rng.choice((3, 40, 90)))]
            output = driver.submit(f"r{number}", prompt, SamplingParams(temperature=0, max_tokens=30))
            outputs.append(output)
            threading.Timer(rng.uniform(0, 0.15), driver.cluster.abort, (f"r{number}",)).start()
            time.sleep(rng.uniform(0, 0.01))
        driver.finish(*outputs)
        for output in outputs:
            assert output.end is not None and output.end.finish in (FinishReason.ABORT, FinishReason.LENGTH)
