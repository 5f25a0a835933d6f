"""Thousands of stories that nobody wrote: whatever goes wrong, no stream is wrong, nothing hangs, nothing is held."""

import os
import random
from typing import Any

import pytest
from sim_world import World, prompt_of

from jmemserve.config import Role
from jmemserve.errors import JmemserveError
from jmemserve.scheduler.messages import MemberState
from jmemserve.types import FinishReason

MESHES = (
    "prefill0:prefill decode0:decode",
    "prefill0:prefill decode0:decode decode1:decode",
    "prefill0:prefill prefill1:prefill decode0:decode",
    "colocated0:colocated colocated1:colocated",
    "prefill0:prefill colocated0:colocated decode0:decode",
)
PEACE = "submit submit submit turn turn step step step step step step wait cancel move move role drain check"
WAR = "kill kill silent start start pause resume cut weather front bytes heal reset"


@pytest.mark.parametrize("part", range(4))
def test_stories(part: int) -> None:
    for seed in range(part * 75, part * 75 + 75):
        tell(seed)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_stories() -> None:
    first = int(os.environ.get("JMEMSERVE_STORY", "1000"))
    for seed in range(first, first + 5000):
        tell(seed, longest=80)


def tell(seed: int, longest: int = 40) -> None:
    """One story. The seed says all."""
    rng = random.Random(seed)
    try:
        _Story(rng).go(rng.randint(5, longest))
    except Exception as error:
        raise AssertionError(f"story {seed} with longest={longest} went wrong: {error}") from error


class _Story:
    def __init__(self, rng: random.Random):
        self.rng = rng
        war = rng.random() < 0.75
        self.words = (PEACE + " " + (WAR if war else "")).split()
        dram = rng.choice((0, 0, 24))
        self.world = World(
            rng.choice(MESHES),
            caching=rng.choice(("none", "prefill", "delta", "full", "full")),
            blocks=rng.choice((16, 24, 64)),
            dram=dram,
            seqs=rng.choice((2, 4)),
            tokens=rng.choice((8, 32)),
            bypass=rng.choice(("off", "off", "auto")),
            rejoins=rng.random() < 0.8,
            rng=rng,
        )
        if war and rng.random() < 0.3:
            self.world.late = 0.5
        self.said: list[str] = []

    def go(self, length: int) -> None:
        with self.world as world:
            try:
                for _ in range(length):
                    word = self.rng.choice(self.words)
                    self.said.append(word)
                    getattr(self, word)()
                self.said.append("the end")
                world.heal()
                for name in self._those(lambda process: not process.alive)[:1]:
                    if not self._ready():
                        world.start(name, "colocated")  # else requests are parked until they fail
                world.run()
                world.check_quiet()
            except BaseException:
                print("\n".join(self.said), world.describe(), sep="\n")
                raise

    # -- words --------------------------------------------------------------------------------------------------------

    def submit(self) -> None:
        rng, name = self.rng, f"r{len(self.world.clients)}"
        prompt = prompt_of(rng.choice(("x", "y")), rng.randint(1, 20)) if rng.random() < 0.4 else None
        self._submit(name, prompt or prompt_of(name, rng.randint(1, 24)))

    def turn(self) -> None:
        """Another turn of a conversation."""
        ended = [c for c in self.world.clients.values() if c.finish is not None and len(c.text) < 40]
        if ended:
            name = f"r{len(self.world.clients)}"
            self._submit(name, self.rng.choice(ended).text + prompt_of(name, self.rng.randint(1, 6)))

    def _submit(self, name: str, prompt: list[int]) -> None:
        rng = self.rng
        deadline = rng.choice((None, None, None, None, 0.1, 20.0))
        limit, salt = rng.randint(1, 16), rng.choice(("", "", "s"))
        number = len(self.world.clients)
        more: dict[str, Any] = {"tenant": ("", "a", "b")[number % 3], "priority": (0, 0, 0, 1, -1)[number % 5]}
        self.said.append(f"  {name}: {len(prompt)} + {limit}, {deadline=}, {salt=}, {more}")
        self._try(lambda: self.world.submit(name, prompt, limit, deadline, salt=salt, stop=rng.random() < 0.5, **more))

    def step(self) -> None:
        for _ in range(self.rng.randint(1, 6)):
            self.world.step()

    def wait(self) -> None:
        self.world.wait(self.rng.choice((0.1, 1.0, 3.0, 12.0, 40.0)))

    def check(self) -> None:
        self.world.check()

    def cancel(self) -> None:
        if ids := self.world.gateway.ids():
            name = self.rng.choice(ids)
            self.said.append(f"  {name}")
            self.world.cancel(name, self.rng.choice((FinishReason.ABORT, FinishReason.STOP)))

    def move(self) -> None:
        if ids := self.world.gateway.ids():
            name, to = self.rng.choice(ids), self.rng.choice(["", *self._ready()])
            self.said.append(f"  {name} to {to or 'anywhere'}")
            self._try(lambda: self.world.cluster.move(name, to))

    def role(self) -> None:
        for name in self._one(self._ready()):
            role = self.rng.choice(list(Role))
            self.said.append(f"  {name} {role}")
            self.world.cluster.set_role(name, role)

    def drain(self) -> None:
        if len(ready := self._ready()) > 1:
            name = self.rng.choice(ready)
            self.said.append(f"  {name}")
            self.world.cluster.drain_instance(name)

    def reset(self) -> None:
        self.world.cluster.reset_prefix_cache()

    def kill(self) -> None:
        for name in self._one(self._those(lambda process: process.alive)):
            self.said.append(f"  {name}")
            self.world.kill(name)

    def silent(self) -> None:
        for name in self._one(self._those(lambda process: process.alive)):
            self.said.append(f"  {name}")
            self.world.kill(name, silent=True)

    def start(self) -> None:
        fresh = f"new{len(self.world.processes)}"
        for name in self._one([*self._those(lambda process: not process.alive), fresh]):
            if len(self.world.processes) < 6 or name in self.world.processes:
                role = self.rng.choice(list(Role)).value
                self.said.append(f"  {name} {role}")
                self.world.start(name, role, self.rng.choice(("", "", "", "others")))

    def pause(self) -> None:
        for name in self._one(self._those(lambda process: process.alive and not process.paused)):
            self.said.append(f"  {name}")
            self.world.processes[name].paused = True

    def resume(self) -> None:
        for name in self._one(self._those(lambda process: process.paused)):
            self.said.append(f"  {name}")
            self.world.processes[name].paused = False

    def cut(self) -> None:
        names = list(self.world.processes)
        if len(names) > 1:
            one, other = self.rng.sample(names, 2)
            self.said.append(f"  {one} {other}")
            self.world.cut(one, other)

    def weather(self) -> None:
        """Between two instances: what the transfer protocol bears."""
        for way in self._one(sorted(self.world.peer_weather)):
            weather = self.world.peer_weather[way]
            setattr(weather, self.rng.choice(("drop", "double", "swap")), self.rng.choice((0.0, 0.1, 0.5)))
            weather.delay = self.rng.choice((0.0, 0.05, 1.0))
            self.said.append(f"  {way} {weather}")

    def front(self) -> None:
        """Between an instance and the front-end: slow, but in order."""
        for name in self._one(sorted(self.world.front_weather)):
            self.world.front_weather[name].delay = self.rng.choice((0.0, 0.1, 2.0))
            self.said.append(f"  {name} {self.world.front_weather[name]}")

    def bytes(self) -> None:
        """Some pieces cannot be fetched."""
        self.world.wire.broken = self.rng.choice((0.0, 0.2, 1.0))

    def heal(self) -> None:
        self.world.heal()

    # -- parts --------------------------------------------------------------------------------------------------------

    def _ready(self) -> list[str]:
        return [name for name in self.world.processes if self.world.state(name) is MemberState.READY]

    def _those(self, wanted) -> list[str]:
        return [name for name, process in self.world.processes.items() if wanted(process)]

    def _one(self, names: list) -> list:
        return [self.rng.choice(names)] if names else []

    def _try(self, call) -> None:
        try:
            call()
        except JmemserveError as error:
            self.said.append(f"    {error}")
