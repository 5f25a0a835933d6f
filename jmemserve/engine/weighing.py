"""What an instance learns of its own costs while it works: for swapping or computing again, and for the router."""

from collections.abc import Callable

from jmemserve.config import SwapPolicy
from jmemserve.engine.runner import Flight
from jmemserve.scheduler.cost_model import Profile, work
from jmemserve.scheduler.costs import CostMeter
from jmemserve.scheduler.local import LocalScheduler
from jmemserve.scheduler.messages import CostNews
from jmemserve.scheduler.refining import Refiner
from jmemserve.scheduler.rules import teaches_prefill

PERIOD_S = 5.0  # between two messages of new costs


class Weigher:
    """Of one instance; call from its thread. ``say`` hears of a profile that has moved."""

    def __init__(
        self,
        scheduler: LocalScheduler,
        swap: SwapPolicy,
        profile: Profile | None,
        say: Callable[[CostNews], None],
    ):
        self._scheduler, self._swap, self._say = scheduler, swap, say
        self._meter, self._refiner = CostMeter(), Refiner(profile)
        self._landed = self._told = 0.0

    @property
    def profile(self) -> Profile | None:
        """As it is believed now."""
        return self._refiner.profile

    @property
    def error(self) -> float:
        """Mean relative error of predicted steps."""
        return self._refiner.error

    def step(self, flight: Flight, now: float) -> None:
        """A step has ended: learn what computing costs, and see if swapping is worth it."""
        began, self._landed = max(flight.launched, self._landed), now
        plan = flight.plan
        if plan.repeats:
            self._refiner.step(plan.shape, plan.num_tokens, 0.0, plan.context, now - began)
        elif self._refiner.profile is not None:
            rows = [(piece.start, piece.length) for piece in plan.planned]
            self._refiner.step(
                plan.shape, plan.num_tokens, *work(plan.shape, rows, self._refiner.profile.tile), now - began
            )
        if teaches_prefill(plan):
            self._meter.step(plan.num_tokens, now - began)
        if self._swap is SwapPolicy.AUTO:
            pool = self._scheduler.pool
            self._scheduler.swap_costs = self._meter.costs()
            pool.swaps.enabled = self._scheduler.swap_costs.worth(1, pool.block_size)
        if now - self._told >= PERIOD_S:
            self._told = now
            profile = self._refiner.news()
            if profile is not None:
                self._say(CostNews(profile))

    def swapped_in(self, blocks: int, seconds: float) -> None:
        """So many blocks came from host memory."""
        self._meter.swap(blocks, seconds)
        self._refiner.swap(blocks, seconds)

    def took_in(self, blocks: int, seconds: float) -> None:
        """So many blocks came from another instance."""
        self._refiner.transfer(blocks, seconds)
