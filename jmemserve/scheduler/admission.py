"""Who is refused at once rather than let wait: limits of the queue, and of the time until a first token.

Limits hold for new requests only: an attempt after an instance was lost, and the later outputs of a call, go on with
work that was accepted. All refusals are Overloaded, with a sentence and a hint when to try again. Pure.
"""

import dataclasses

from jmemserve.config import EngineConfig, parse_weights
from jmemserve.errors import Overloaded

QUEUE_RETRY_S = 1.0
SOONEST_RETRY_S, LATEST_RETRY_S = 0.1, 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a cluster takes. None: no such limit."""

    max_queue: int  # requests that wait for their first token
    max_queue_per_tenant: int | None = None
    max_queue_delay_s: float | None = None  # predicted seconds until a first token
    weights: tuple[tuple[str, float], ...] = ()  # of the tenants that have not 1

    @classmethod
    def of(cls, engine: EngineConfig) -> "Limits":
        """Those of a configuration."""
        weights = tuple(parse_weights(engine.tenant_weights or "").items())
        return cls(engine.max_queue, engine.max_queue_per_tenant, engine.max_queue_delay_s, weights)

    def check_queue(self, waiting: int, waiting_of_tenant: int) -> None:
        """Raise Overloaded if no more may wait, in the whole or of one tenant."""
        if waiting >= self.max_queue:
            raise Overloaded(f"{waiting} requests wait already (--max-queue); try again later", QUEUE_RETRY_S)
        if self.max_queue_per_tenant is not None and waiting_of_tenant >= self.max_queue_per_tenant:
            raise Overloaded(
                f"{waiting_of_tenant} requests of this tenant wait already (--max-queue-per-tenant); try again later",
                QUEUE_RETRY_S,
            )

    def check_delay(self, predicted_s: float, left_s: float | None) -> None:
        """Raise Overloaded if the first token is predicted too late.

        That is after ``max_queue_delay_s``, or when no more than ``left_s`` seconds of its deadline are left: who
        trusts the prediction enough to set a limit spares its clients that wait as well. Without a limit nothing is
        refused, and a deadline ends what it has overtaken.
        """
        limit, why = self.max_queue_delay_s, "--max-queue-delay"
        if limit is None:
            return
        if left_s is not None and left_s < limit:
            limit, why = left_s, "the request's deadline"
        if predicted_s > limit:
            hint = min(LATEST_RETRY_S, max(SOONEST_RETRY_S, predicted_s - limit))
            raise Overloaded(
                f"the first token would take some {predicted_s:.2g} s, and {max(0.0, limit):.2g} s is the limit "
                f"({why}); try again in {hint:.2g} s",
                hint,
            )


def in_line(predicted_s: float, own: float, ahead: float, behind: float) -> float:
    """The seconds until a first token, where a prediction takes all that waits to come first.

    ``own``, ``ahead`` and ``behind`` are tokens to be computed at the same instance: of the request, and of those that
    wait and are served before or after it. What is behind costs it nothing, so that neither a tenant that floods the
    queue nor work of low priority gets others refused.
    """
    whole = own + ahead + behind
    return predicted_s * (own + ahead) / whole if whole else predicted_s
