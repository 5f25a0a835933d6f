"""A pool with two media driven by random calls against a dictionary, with pretended bytes in every block."""

from collections import Counter
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pool_world import DRAM, HBM, MIXED, OWNERS, SALTS, World, random_calls

picks, sizes, seeds = st.integers(0, 99), st.integers(0, 7), st.integers(0, 15)
salts, owners, media = st.sampled_from(SALTS), st.sampled_from(OWNERS), st.sampled_from([HBM, DRAM, MIXED])


class MediaMachine(RuleBasedStateMachine):
    """Every call of ``World`` as a rule."""

    @initialize(num_hbm=st.integers(1, 12), num_dram=st.integers(0, 12))
    def start(self, num_hbm: int, num_dram: int) -> None:
        self.world = World(num_hbm, num_dram)

    @rule(seed=seeds, n=sizes, salt=salts, medium=media)
    def serve(self, seed, n, salt, medium):
        self.world.serve(seed, n, salt, medium)

    @rule(seed=seeds, n=sizes, salt=salts, medium=media)
    def compute_again(self, seed, n, salt, medium):
        self.world.compute_again(seed, n, salt, medium)

    @rule(pick=picks)
    def insert_again(self, pick):
        self.world.insert_again(pick)

    @rule(pick=picks)
    def insert_wrongly(self, pick):
        self.world.insert_wrongly(pick)

    @rule(n=sizes, medium=media, owner=st.none() | owners)
    def alloc(self, n, medium, owner):
        self.world.alloc(n, medium, owner)

    @rule(pick=picks, cut=st.integers(0, 3))
    def free(self, pick, cut):
        self.world.free(pick, cut)

    @rule(pick=picks)
    def share(self, pick):
        self.world.share(pick)

    @rule(pick=picks, owner=owners)
    def give(self, pick, owner):
        self.world.give(pick, owner)

    @rule(owner=owners)
    def free_owned_by(self, owner):
        self.world.free_owned_by(owner)

    @rule(seed=seeds, n=sizes, salt=salts)
    def match(self, seed, n, salt):
        self.world.match(seed, n, salt)

    @rule(pick=picks)
    def release(self, pick):
        self.world.release(pick)

    @rule(pick=picks)
    def take_lease(self, pick):
        self.world.take_lease(pick)

    @rule(seed=seeds, n=sizes, salt=salts)
    def delete(self, seed, n, salt):
        self.world.delete(seed, n, salt)

    @rule()
    def clear(self):
        self.world.clear()

    @rule(n=sizes)
    def swap_out(self, n):
        self.world.swap_out(n)

    @rule(n=sizes)
    def write_back(self, n):
        self.world.write_back(n)

    @rule(pick=picks)
    def swap_in(self, pick):
        self.world.swap_in(pick)

    @rule()
    def take_orders(self):
        self.world.take_orders()

    @rule(pick=picks, well=st.booleans())
    def end(self, pick, well):
        self.world.end(pick, well)

    @rule(enabled=st.booleans())
    def enable(self, enabled):
        self.world.enable(enabled)

    @invariant()
    def agrees(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.finish()


TestMediaMachine = MediaMachine.TestCase
TestMediaMachine.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


def live(lives: int, calls: int, seed: int) -> Counter[str]:
    """Many pools, one after the other, each with so many calls."""
    random, seen = Random(seed), Counter[str]()
    for _ in range(lives):
        world = World(random.randint(1, 16), random.choice((0, *[random.randint(1, 24)] * 7)))
        for _ in range(calls):
            random_calls(world, random)()
            world.check()
        world.finish()
        seen += world.seen
        seen["subtrees"] += world.subtrees
    return seen


def test_a_long_life():
    seen = live(lives=30, calls=400, seed=0)  # 12,000 calls
    wanted = {"hits": 1500, "mixed": 80, "lost": 300, "duplicates": 100, "written back": 50, "subtrees": 5}
    wanted |= {"done out": 300, "failed out": 30, "done in": 100, "failed in": 10}
    assert all(seen[what] >= least for what, least in wanted.items()), seen


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_soak():
    assert live(lives=100, calls=2000, seed=1)["done in"] > 1000
