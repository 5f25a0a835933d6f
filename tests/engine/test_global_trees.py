"""The front-end's trees follow the real pools, and blocks are pulled from a peer where that is predicted to pay."""

import time

import pytest
from engine_driver import Driver, tiny_model

from jmemserve.config import Caching, Policy, PromptTrees, Warmup
from jmemserve.scheduler.cost_model import Profile
from jmemserve.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
# Computing is dear, moving is cheap.
PULLS = Profile(((1, 1, 0.01), (4, 4, 0.01), (24, 4, 0.5)), transfer_call_s=1e-3, transfer_block_s=1e-4)
FAST = {"warmup": Warmup.FAST}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def ask(driver: Driver, name: str, prompt: list[int]):
    output = driver.submit(name, prompt, GREEDY)
    driver.finish(output)
    return output


def settle(driver: Driver, prompt: list[int]) -> dict[str, tuple[int, int]]:
    """What the router believes of a prompt, once it agrees with the pools."""
    limit = time.monotonic() + 20
    while True:
        cluster = driver.cluster
        with cluster._lock:
            beliefs = cluster._gateway.router.beliefs
            found = beliefs.tree.match(_raw(prompt), "", (len(prompt) - 1) // 4)
        believed = {name: tuple(holding) for name, holding in found.items()}
        true = {}
        for name, instance in driver.instances.items():
            hbm, dram = instance.call(lambda instance=instance: instance.pool.peek_media(prompt))
            if hbm + dram:
                true[name] = (hbm + dram, dram)
        if believed == true:
            return believed
        assert time.monotonic() < limit, f"{believed=}, {true=}"
        time.sleep(0.02)


def _raw(prompt):
    from jmemserve.kvpool.runs import pack

    return pack(prompt, len(prompt))


def test_trees_follow_the_pools(model):
    with Driver(model, "prefill+decode", caching=Caching.FULL, kv_cache_tokens=160, max_model_len=80, **FAST) as driver:
        for number in range(12):  # more than fits: much is evicted
            prompt = [number + 1, *range(2, 40)]
            output = ask(driver, f"r{number}", prompt)
            for earlier in range(number + 1):
                settle(driver, [earlier + 1, *range(2, 40), *output.tokens])
        assert driver.cluster._gateway.router.predictions.renewals == 0, "no event was missed"
        for _ in range(50):  # what is on its way back to the prefill instance arrives after a reset
            driver.cluster.reset_prefix_cache()
            if not settle(driver, prompt):
                break
        assert settle(driver, prompt) == {}


def test_a_missed_event_is_noticed_and_mended(model):
    with Driver(model, "2xcolocated", **FAST) as driver:
        ask(driver, "one", [*range(30)])
        settle(driver, [*range(30)])
        for instance in driver.instances.values():  # the next events are lost
            teller = instance.frontends._tellers[""]
            instance.call(lambda teller=teller: setattr(teller, "_told", teller._told + 1))
        for number in range(4):
            ask(driver, f"more{number}", [number, *range(40, 70)])
        settle(driver, [0, *range(40, 70)])
        settle(driver, [3, *range(40, 70)])
        assert driver.cluster._gateway.router.predictions.renewals >= 1


def test_predictions_are_compared_with_what_was_found(model):
    with Driver(model, "prefill+decode", **FAST) as driver:
        prompt = [*range(50)]
        for number in range(5):
            output = ask(driver, f"r{number}", prompt)
            prompt += output.tokens
            settle(driver, prompt)
        predictions = driver.cluster._gateway.router.predictions
        assert predictions.requests == 5
        assert predictions.predicted_tokens + predictions.under_tokens == predictions.cached_tokens > 0
        assert predictions.over_tokens == 0 < predictions.predicted_tokens
        assert predictions.under_tokens <= 16, "what came back between the decision and its execution"


@pytest.mark.parametrize("mesh", ["2xcolocated", "2xprefill+decode", "colocated:model=2+colocated"])
def test_a_peer_sends_its_blocks_and_the_answer_is_the_same(model, mesh):
    with Driver(model, mesh, caching=Caching.FULL, **FAST) as driver:
        prompt = [*range(61)]
        first = ask(driver, "first", prompt)
        settle(driver, prompt)
        router = driver.cluster._gateway.router
        with driver.cluster._lock:
            for name in driver.instances:
                router.set_profile(name, PULLS)
            holder = max(router.beliefs.tree.match(_raw(prompt), "", 15).items(), key=lambda item: item[1].blocks)[0]
            for name, instance in router._instances.items():
                instance.load.pending_s += 1e3 if name == holder else 0.0
                if name != holder:
                    for feed in (router.beliefs._beliefs[name].promised,):
                        feed.close()
        second = ask(driver, "second", [*prompt, 5, 6, 7])
        assert driver.cluster._gateway.counts.pulls == 1
        assert second.end.usage.cached_tokens == 60, "computed just what was new"
        third = ask(driver, "third", prompt)
        assert third.tokens == first.tokens
        with driver.cluster._lock:
            for instance in router._instances.values():
                instance.load.pending_s = 0.0


def test_responses_may_teach_instead(model):
    trees = {"prompt_trees": PromptTrees.RESPONSES, "prompt_tree_ttl_s": 30.0}
    with Driver(model, "prefill+decode", policy=Policy.LONGEST_PREFIX, **trees, **FAST) as driver:
        prompt = [*range(50)]
        for number in range(3):
            prompt += ask(driver, f"r{number}", prompt).tokens
        predictions = driver.cluster._gateway.router.predictions
        assert predictions.cached_tokens > 0
        assert predictions.over_tokens <= 16, "what is on its way back may be missing"
