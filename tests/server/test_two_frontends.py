"""Two front-ends serve the same instances; either may be killed and started again, and streams do not notice."""

import signal
import time
from collections.abc import Callable, Iterator

import pytest
from process_world import PROMPT, START_S, Process, Stream, World, nothing_held, nothing_moves

from jmemserve.client import Client
from jmemserve.errors import JmemserveError, Unavailable
from jmemserve.types import InstanceLoad, SamplingParams

SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
SALTED = SamplingParams(temperature=0, max_tokens=430, ignore_eos=True)
INSTANCES = {"prefill0": "ready", "decode0": "ready"}


class Second:
    """The second front-end of a world, in one life of it."""

    def __init__(self, world: World):
        self.world = world
        self.process: Process = world.start("second", "--role", "frontend", "--port", "0", "--join", world.address)
        self.address = self.process.wait_for(r"listens on \S+").split()[-1]

    def client(self) -> Client:
        return Client(self.address)

    def wait_ready(self) -> None:
        """Until it serves by both instances."""
        self.process.wait_for("ready; try")
        wait_until(lambda: states(self) == INSTANCES, self.process.log.read_text())


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = START_S) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.02)


def states(door: World | Second) -> dict[str, str]:
    """Of those that are alive, as one front-end sees them."""
    with door.client() as client:
        return {m.name: m.state for m in client.cluster().members if m.state not in ("dead", "left")}


def serves(door: World | Second) -> bool:
    """Whether it has both instances. Not before it listens."""
    try:
        return states(door) == INSTANCES
    except JmemserveError:
        return False


def loads(door: World | Second) -> dict[str, InstanceLoad]:
    with door.client() as client:
        return {load.instance: load for load in client.loads()}


def predictions(client: Client) -> tuple[int, int]:
    report = client.cluster()
    return report.predicted_tokens, report.cached_tokens


def restart_primary(world: World) -> None:
    port = world.address.rpartition(":")[2]
    world.frontend = world.start("frontend-again", "--role", "frontend", "--port", port)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("two"))
    try:
        world.join("prefill", "prefill0").wait_for("is a member")
        world.join("decode", "decode0").wait_for("is a member")  # it finds what the first one compiled
        world.frontend.wait_for("ready; try")
        yield world
    finally:
        for process in world.started:
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait(30)


@pytest.fixture(scope="module")
def truth(world: World) -> list[int]:
    """The answer to PROMPT of one front-end, while nothing happens."""
    return Stream(world, PROMPT).result()


@pytest.fixture(scope="module")
def seconds(world: World, truth: list[int]) -> Iterator[list[Second]]:
    """The lives of the second front-end, newest last."""
    seconds = [Second(world)]
    seconds[0].wait_ready()
    yield seconds
    if seconds[-1].process.popen.poll() is None:
        assert seconds[-1].process.end() == 0


@pytest.mark.parametrize("role", ["", "colocated"])
def test_streams_through_both_have_the_right_tokens(
    world: World, seconds: list[Second], truth: list[int], role: str
) -> None:
    second = seconds[-1]
    if role:
        with world.client() as client:
            for name in INSTANCES:
                client.set_role(name, role)
        for door in (world, second):  # the second one hears it from the instances themselves
            wait_until(lambda door=door: {load.role for load in loads(door).values()} == {role}, f"all {role}")
    streams = [Stream(door, PROMPT, request_id=f"s{n}") for n in range(2) for door in (world, second)]
    for stream in streams:
        assert stream.result() == truth
    nothing_held(world)
    if role:
        with world.client() as client:
            client.set_role("prefill0", "prefill")
            client.set_role("decode0", "decode")
        wait_until(lambda: {load.role for load in loads(second).values()} == {"prefill", "decode"}, "as before")


def test_a_prefix_made_through_one_is_a_predicted_hit_through_the_other(world: World, seconds: list[Second]) -> None:
    prompt = [(11 * n) % 500 + 3 for n in range(100)]
    with world.client() as first, seconds[-1].client() as second:
        for maker, user in ((first, second), (second, first)):
            maker.generate(prompt, SHORT)
            nothing_moves(first)
            time.sleep(0.1)  # events of the caches are on their way
            predicted, cached = predictions(user)
            [output] = user.generate([*prompt, 5, 6], SHORT)
            assert output.usage.cached_tokens == 96
            assert predictions(user) == (predicted + 96, cached + 96)
            prompt = [token + 1 for token in prompt]


def test_the_second_one_says_who_decides_on_members(world: World, seconds: list[Second]) -> None:
    with seconds[-1].client() as client:
        for ask in (lambda: client.set_role("prefill0", "decode"), lambda: client.drain_instance("decode0")):
            with pytest.raises(Unavailable, match=f"ask the one at {world.address} to"):
                ask()
        stream = Stream(seconds[-1], PROMPT, request_id="moving")
        stream.wait_tokens(20)
        assert client.move("moving", "prefill0") == ["prefill0"], "its own requests are its own business"
        assert len(stream.result()) == 300
    lost = world.start("lost", "--role", "prefill", "--join", seconds[-1].address)
    assert lost.popen.wait(START_S) == 2
    assert f"--join {world.address} instead" in lost.log.read_text()


def test_an_instance_that_leaves_gives_away_what_both_have_there(
    world: World, seconds: list[Second], truth: list[int]
) -> None:
    more = world.join("decode", "decode1")
    more.wait_for("is a member")
    doors = (world, seconds[-1])
    for door in doors:
        wait_until(lambda door=door: states(door) == INSTANCES | {"decode1": "ready"}, "it is there for both")
    streams = [Stream(door, PROMPT, request_id=f"leaves{n}") for n, door in enumerate(doors)]
    for n, (door, stream) in enumerate(zip(doors, streams, strict=True)):
        stream.wait_tokens(10)
        with door.client() as client:
            try:
                client.move(f"leaves{n}", "decode1")
            except JmemserveError as error:
                assert "no other instance" in str(error)  # it is there already
    for stream in streams:
        stream.wait_tokens(60)
    assert more.end() == 0
    for stream in streams:
        assert stream.result() == truth
    for door in doors:
        wait_until(lambda door=door: states(door) == INSTANCES, "it is gone for both")
        with door.client() as client:
            assert client.cluster().retries == 0, "all went in order"
    nothing_held(world)


def test_the_death_of_the_second_one_frees_what_it_held(world: World, seconds: list[Second], truth: list[int]) -> None:
    before = loads(world)["decode0"].steps
    orphans = [Stream(seconds[-1], [token + 9, *PROMPT], SALTED) for token in range(2)]
    for orphan in orphans:
        orphan.wait_tokens(20)
    seconds[-1].process.end(signal.SIGKILL)
    killed = time.monotonic()
    # There is room for two, so this stream begins once an orphan is gone.
    assert Stream(world, PROMPT).result() == truth
    nothing_held(world)
    print(f"\nthe other's stream ended {time.monotonic() - killed:.2f} s after the death of the second front-end")
    assert loads(world)["decode0"].steps - before < 300 + 120, "no orphan was served to its end"
    assert all(orphan.error for orphan in orphans if not orphan.is_alive())


def test_the_second_one_goes_on_while_the_first_one_is_away(
    world: World, seconds: list[Second], truth: list[int]
) -> None:
    if seconds[-1].process.popen.poll() is not None:
        seconds.append(Second(world))
        seconds[-1].wait_ready()
    second = seconds[-1]
    stream = Stream(second, PROMPT)
    gone = Stream(world, PROMPT)
    for each in (stream, gone):
        each.wait_tokens(20)
    world.frontend.end(signal.SIGKILL)
    assert stream.result() == truth, "it was under way"
    assert Stream(second, PROMPT).result() == truth, "it is new"
    nothing_held(second)
    restart_primary(world)
    streams = 0
    while not serves(world):  # instances join again meanwhile
        assert Stream(second, PROMPT).result() == truth
        streams += 1
    assert states(second) == INSTANCES
    wait_until(lambda: second.process.log.read_text().count("follows the front-end") == 2, "and is followed again", 5)
    assert Stream(world, PROMPT).result() == truth
    with second.client() as client:
        report = client.cluster()
    print(f"\n{streams} streams meanwhile, {report.retries} of all continued elsewhere")
    assert report.retries == 0, "no instance was ever lost"
    nothing_held(world)


def test_a_front_end_that_starts_again_knows_what_is_cached(world: World, seconds: list[Second]) -> None:
    assert seconds[-1].process.end() == 0
    prompts = [[(13 * n + shift) % 500 + 3 for n in range(100)] for shift in range(6)]
    with world.client() as client:
        for prompt in prompts:
            client.generate(prompt, SHORT)
        nothing_moves(client)
        blocks = client.cluster().tree_blocks
    world.frontend.end(signal.SIGKILL)
    began = time.monotonic()
    restart_primary(world)
    world.frontend.wait_for(r"listens on \S+")
    listens = time.monotonic()

    def warm() -> bool:
        try:
            with world.client() as client:
                return client.cluster().tree_blocks == blocks
        except JmemserveError:
            return False

    wait_until(warm, "the snapshots have come")
    known = time.monotonic()
    wait_until(lambda: states(world) == INSTANCES, "both are ready")
    with world.client() as client:
        for number, prompt in enumerate(prompts):
            [output] = client.generate([*prompt, 5, 6], SHORT)
            assert output.usage.cached_tokens == 96
            assert predictions(client) == (96 * (number + 1), 96 * (number + 1))
    print(f"\n{blocks} cached blocks are known {known - listens:.2f} s after it listens, {known - began:.2f} s in all")
    assert known - listens < 10
