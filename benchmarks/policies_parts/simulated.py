"""The same sessions on simulated instances, as many as one likes."""

import functools

from policies_parts.documents import Session
from policies_parts.rows import Asked, Row, row

from jmemserve.config import EngineConfig, Policy, parse_mesh
from jmemserve.scheduler.cost_model import Profile
from jmemserve.simulator.cluster import Setting, SimCluster
from jmemserve.simulator.load import Job, Load


def play(mesh: str, policy: str, profile: Profile, engine: EngineConfig, sessions: list[Session], ratio: int) -> Row:
    """One run, from empty caches."""
    import dataclasses

    specs = parse_mesh(mesh)
    setting = Setting(specs, {spec.name: profile for spec in specs}, dataclasses.replace(engine, policy=Policy(policy)))
    cluster = SimCluster(setting)
    cluster.run(load(sessions))
    asked = [Asked(o.prompt, o.cached, o.ttft, o.jct) for o in cluster.outcomes]
    computed = {name: i.computed for name, i in cluster.instances.items() if i.spec.role.prefills}
    return row(f"simulated {mesh}", policy, ratio, asked, computed)


def load(sessions: list[Session]) -> Load:
    """Each session at its time; its next turn follows the answer."""
    for session in sessions:
        yield session.start_s, _job(session, 0)


def _job(session: Session, turn: int) -> Job:
    prompt, answer = session.turns[turn]
    last = turn + 1 == len(session.turns)
    return Job(
        session.name,
        functools.partial(list, prompt),
        answer,
        None if last else functools.partial(_after, session, turn),
    )


def _after(session: Session, turn: int, prompt: list[int], answer: list[int]) -> tuple[float, Job]:
    return 0.0, _job(session, turn + 1)
