"""Short runs of the simulator."""

from collections.abc import Callable, Iterator

from jmemserve.config import EngineConfig, parse_mesh
from jmemserve.scheduler.cost_model import Profile
from jmemserve.simulator.cluster import Setting, SimCluster
from jmemserve.simulator.load import Job, Load, stretch

PROFILE = Profile(
    steps=((1, 1, 0.003), (4, 4, 0.004), (16, 4, 0.005), (64, 4, 0.009)),
    pair_s=1e-7,
    context_s=1e-6,
    transfer_call_s=0.002,
    transfer_block_s=0.0005,
    swap_call_s=0.001,
    swap_block_s=0.0002,
)


def build(mesh: str, dram: int = 0, cores: float | None = None, front_end_s: float = 0.0, **engine) -> SimCluster:
    """A cluster of small instances."""
    small = {"block_size": 4, "kv_cache_tokens": 1024, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    specs = parse_mesh(mesh)
    profiles = {spec.name: PROFILE for spec in specs}
    return SimCluster(Setting(specs, profiles, EngineConfig(**(small | engine)), dram, cores, front_end_s))


def simulate(mesh: str, load: Load, **how) -> SimCluster:
    """Run a load to its end, and see that it is a clean one."""
    cluster = build(mesh, **how)
    cluster.run(load)
    cluster.check()
    return cluster


def one(prompt: int, output: int) -> Load:
    """A single request."""
    yield 1.0, Job("one", lambda: stretch(1, prompt), output)


def talk(turns: int, user: int, answer: int, pause: float, said: Callable[[int], None] = lambda turn: None) -> Load:
    """A conversation: each turn goes on with the answer before. ``said(turn)`` is called as a turn is sent."""

    def job(history: list[int], turn: int) -> Job:
        def make() -> list[int]:
            said(turn)
            return [*history, *stretch(100 + turn, user)]

        def after(prompt: list[int], made: list[int]) -> tuple[float, Job] | None:
            return (pause, job([*prompt, *made], turn + 1)) if turn + 1 < turns else None

        return Job("talk", make, answer, after)

    yield 0.0, job([], 0)


def burst(count: int, prompt: int, output: int, every: float) -> Iterator[tuple[float, Job]]:
    """Requests one after the other, a third of which begin alike."""
    for number in range(count):
        yield (
            number * every,
            Job(f"b{number}", lambda n=number: [*stretch(n % 3, prompt // 2), *stretch(n + 900, prompt // 2)], output),
        )
