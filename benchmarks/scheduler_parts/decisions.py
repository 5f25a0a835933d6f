"""How long the router takes to decide, all in all: packing the prompt, matching it, weighing every instance."""

import random
import time
from collections.abc import Iterator

import numpy as np
from pool_parts.rows import Aim, Part, Row

from jmemserve.config import Role
from jmemserve.kvpool.address import Medium
from jmemserve.kvpool.events import Stored
from jmemserve.kvpool.runs import pack
from jmemserve.scheduler.cost_model import Profile
from jmemserve.scheduler.policies import POLICIES
from jmemserve.scheduler.router import Router

BLOCK = 16
SYSTEM = 512  # tokens that all conversations begin with
VOCABULARY = 32_000
HOLDERS = 3  # instances that hold a conversation
IN_FLIGHT = 64
PROFILE = Profile(
    steps=((1, 1, 0.008), (64, 64, 0.012), (512, 64, 0.03), (8192, 64, 0.4)),
    pair_s=1e-9,
    context_s=1e-8,
    transfer_call_s=1e-3,
    transfer_block_s=2e-5,
    swap_call_s=1e-3,
    swap_block_s=4e-5,
)


def run(tokens: tuple[int, ...], instances: tuple[int, ...], blocks: int, count: int) -> Part:
    """Every size with the policy ``cost``, and every policy at one size."""
    rows = [measure(number, length, blocks, count) for number in instances for length in tokens]
    plain = [measure(64, 4096, blocks, count, policy) for policy in POLICIES]
    part = Part({"microseconds per decision": rows, "by policy": plain})
    part.remarks.append("packing the prompt's tokens, matching, weighing all instances and counting the choice")
    for row in rows:
        if (row["instances"], row["tokens"]) == (64, 4096):
            part.aims.append(Aim("decision at 4K tokens and 64 instances, P50", row["p50_us"], 200, "us"))
            part.aims.append(Aim("decision at 4K tokens and 64 instances, P99", row["p99_us"], 1000, "us"))
    return part


def cluster(instances: int, policy: str) -> Router:
    """Half of them prefill, half decode; each with costs of its own, as when all have been refined."""
    names = [(f"p{i}", Role.PREFILL) for i in range(instances - instances // 2)]
    names += [(f"d{i}", Role.DECODE) for i in range(instances // 2)]
    router = Router(names, BLOCK, policy)
    for place, (name, _) in enumerate(names):
        router.set_profile(name, Profile(PROFILE.steps, PROFILE.pair_s * (1 + place / 1000), *_rest()))
    return router


def _rest() -> tuple[float, ...]:
    p = PROFILE
    return p.context_s, p.transfer_call_s, p.transfer_block_s, p.swap_call_s, p.swap_block_s


def fill(router: Router, blocks: int, tokens: int, rng: random.Random) -> list[tuple[int, ...]]:
    """Conversations of so many tokens, until the tree has so many blocks; told by events, as pools do."""
    names = list(router._instances)
    numbers = dict.fromkeys(names, 0)
    ids = dict.fromkeys(names, 1)
    system = [rng.randrange(VOCABULARY) for _ in range(SYSTEM)]
    found: list[tuple[int, ...]] = []
    per = tokens // BLOCK
    while router.beliefs.tree.num_blocks < blocks:
        text = (*system, *np.random.default_rng(len(found)).integers(0, VOCABULARY, tokens - SYSTEM).tolist())
        found.append(text)
        raw = pack(text, per * BLOCK)
        for name in rng.sample(names, min(HOLDERS, len(names))):
            numbers[name] += 1
            new = tuple(range(ids[name], ids[name] + per))
            told = router.beliefs.on_events(name, [Stored(numbers[name], Medium.HBM, b"m\0\0", 0, new, raw)], 0.0)
            assert told, name
            ids[name] += per
    return found


def prompts(known: list[tuple[int, ...]], tokens: int, rng: random.Random) -> Iterator[tuple[int, ...]]:
    """The next turns of known conversations: all is cached somewhere but the last 96 tokens."""
    while True:
        yield (*rng.choice(known)[: tokens - 96], *(rng.randrange(VOCABULARY) for _ in range(96)))


def measure(instances: int, tokens: int, blocks: int, count: int, policy: str = "cost") -> Row:
    """Microseconds per decision, with some requests in flight at any time."""
    rng = random.Random(instances + tokens)
    router = cluster(instances, policy)
    following = prompts(fill(router, blocks, tokens, rng), tokens, rng)
    times = []
    for number in range(count + IN_FLIGHT):
        prompt, now = next(following), number * 0.01
        start = time.perf_counter()
        router.route(f"r{number}", prompt, "", now)
        if number >= IN_FLIGHT:
            times.append((time.perf_counter() - start) * 1e6)
            router.on_first_token(f"r{number - IN_FLIGHT}", now)
            router.on_finished(f"r{number - IN_FLIGHT}", prompt, now)
    return {
        "policy": policy,
        "tokens": tokens,
        "instances": instances,
        "tree_blocks": router.beliefs.tree.num_blocks,
        "p50_us": float(np.percentile(times, 50)),
        "p99_us": float(np.percentile(times, 99)),
    }
