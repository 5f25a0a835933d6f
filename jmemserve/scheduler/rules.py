"""What an instance decides about its sequences besides its steps. Pure; the engine and the simulator obey the same."""

from jmemserve.config import Role
from jmemserve.scheduler.local import LocalScheduler
from jmemserve.scheduler.plan import Plan
from jmemserve.scheduler.sequence import Sequence


def wants_to_leave(seq: Sequence, role: Role, instance: str) -> bool:
    """A prefill-only instance lets go as soon as there is nothing left to catch up with, others when asked."""
    wanted = seq.moving or not role.decodes and not seq.stays
    return wanted and not seq.full and seq.decode_hint not in (None, instance)


def is_crowded(scheduler: LocalScheduler, sequences: int) -> bool:
    """Is nobody adopted now? Those who wait here get blocks first."""
    return bool(scheduler.waiting) or sequences >= 2 * scheduler.max_seqs


def teaches_prefill(plan: Plan) -> bool:
    """Is a step mostly of prompts, so that its time tells what computing them costs?"""
    return plan.shape.tokens > plan.shape.seqs and plan.num_tokens >= 4 * plan.num_rows
