"""The cheapest cluster that keeps its promises, over the number of devices and the ratio of prefill to decode."""

import dataclasses
from collections.abc import Callable, Iterator

from jmemserve.errors import ConfigError
from jmemserve.scheduler.cost_model import CostModel
from jmemserve.simulator.load import Load
from jmemserve.simulator.report import Row

SHARING = 16  # sequences that share a step of decoding, about


def demand(load: Load, costs: CostModel) -> tuple[float, float]:
    """Seconds of device time that a load takes to prefill and to decode, were nothing cached; of every tenth job."""
    prefill = decode = 0.0
    for number, (_, job) in enumerate(load):
        if number % 10 == 0:
            tokens = len(job.prompt())
            prefill += costs.prefill_s(tokens, 0)
            decode += job.output * costs.decode_step_s(SHARING, SHARING * tokens) / SHARING
    return prefill, decode


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """Seconds at the 99th percentile; None: anything."""

    ttft_p99_s: float | None = None
    tpot_p99_s: float | None = None

    def met(self, row: Row) -> bool:
        """By a run that refused nobody."""
        ttft = self.ttft_p99_s is None or row["ttft_p99"] <= self.ttft_p99_s
        # Where all answers are one token long there is no time between tokens to be too long.
        tpot = self.tpot_p99_s is None or not row["tpot_p99"] > self.tpot_p99_s
        return not row["refused"] and ttft and tpot


def meshes(instances: int, devices: int = 1) -> list[str]:
    """All clusters of so many instances of ``devices`` each: colocated ones, and every ratio of P to D."""
    axis = f":{devices}" if devices > 1 else ""
    found = [f"{instances}xcolocated{axis}"]
    for prefill in range(1, instances):
        found.append(f"{prefill}xprefill{axis}+{instances - prefill}xdecode{axis}")
    return found


def promising(instances: int, devices: int, loads: tuple[float, float]) -> list[str]:
    """The same, but of the ratios only those around that of the work: (prefill, decode) seconds of device time."""
    total = sum(loads)
    share = loads[0] / total if total else 0.5
    best = min(max(1, round(share * instances)), instances - 1)
    near = {f for f in (best - 1, best, best + 1) if 1 <= f < instances}
    return [mesh for mesh in meshes(instances, devices) if "+" not in mesh or int(mesh.split("x")[0]) in near]


def cheapest(
    run: Callable[[str], Row], goal: Goal, most: int, devices: int, loads: tuple[float, float]
) -> Iterator[tuple[Row, bool]]:
    """Runs, and whether each met the goal; the smallest that did is the cheapest. Raises ConfigError if none does.

    Doubles the number of instances until the goal is met, then halves the interval: more instances never do worse but
    for accidents of routing.
    """

    def enough(count: int) -> Iterator[tuple[Row, bool]]:
        for mesh in promising(count, devices, loads):
            row = run(mesh)
            met = goal.met(row)
            yield row, met
            if met:
                return

    fails, works, count = 0, 0, 1
    while not works:
        last = False
        for row, last in enough(count):
            yield row, last
        if last:
            works = count
        elif count >= most:
            raise ConfigError(f"{most} instances do not meet the goal; give --sweep more, or lower the load")
        else:
            fails, count = count, min(2 * count, most)
    while works - fails > 1:
        middle, last = (works + fails) // 2, False
        for row, last in enough(middle):
            yield row, last
        fails, works = (fails, middle) if last else (middle, works)
