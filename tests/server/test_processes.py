"""Instances in processes of their own: they join, are refused, leave, die and come back; streams do not notice."""

import signal
import time
from collections.abc import Iterator

import pytest
from process_world import LONG, PROMPT, START_S, Stream, World, nothing_held, nothing_moves

from jmemserve.errors import JmemserveError, UnknownRequest
from jmemserve.types import SamplingParams


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("cluster"))
    try:
        first = world.join("prefill", "prefill0")
        first.wait_for("is a member")
        second = world.join("decode", "decode0")  # it finds what the first one compiled
        second.wait_for("is a member")
        world.frontend.wait_for("ready; try")
        yield world
        assert world.frontend.end() == 0, world.frontend.log.read_text()[-2000:]
    finally:
        for process in world.started:
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait(30)


@pytest.fixture(scope="module")
def truth(world: World) -> list[int]:
    """The answer to PROMPT while nothing happens."""
    return Stream(world, PROMPT).result()


def test_two_processes_serve_and_share_a_conversation(world: World, truth: list[int]) -> None:
    assert len(truth) == 300
    with world.client() as client:
        report = client.cluster()
        assert {m.name: (m.role, m.state) for m in report.members} == {
            "prefill0": ("prefill", "ready"),
            "decode0": ("decode", "ready"),
        }
        assert all(way.startswith("staged") for m in report.members for _, way in m.peers)
        nothing_moves(client)
        follow_up = [*PROMPT, *truth, 5, 6, 7]
        [output] = client.generate(follow_up, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        # What decode made has come back to prefill: all but the last, unfinished block.
        assert output.usage.cached_tokens >= (len(PROMPT) + len(truth) - 1) // 16 * 16
        assert all(load.compiles_after_warmup == 0 for load in client.loads())
    nothing_held(world)


def test_who_does_not_fit_is_refused_in_words(world: World) -> None:
    other = world.join("decode", "misfit", block_size="32")
    assert other.popen.wait(START_S) == 2
    text = other.log.read_text()
    assert "its --block-size is 32, that of" in text and "start it with the same model and flags" in text
    taken = world.join("decode", "longer", dtype="bfloat16")  # seen only when it is loaded
    assert taken.popen.wait(START_S) == 2
    assert "kind of blocks" in taken.log.read_text()
    (world.folder / "wrong").write_bytes(b"0" * 64)
    stranger = world.join("decode", "stranger", secret_file=str(world.folder / "wrong"))
    stranger.wait_for("another secret")
    stranger.end(signal.SIGKILL)
    assert "stranger" not in world.states()


def test_an_instance_joins_serves_and_leaves_during_a_stream(world: World, truth: list[int]) -> None:
    stream = Stream(world, PROMPT, request_id="moving")
    more = world.join("decode", "decode1")
    assert stream.result() == truth
    more.wait_for("is a member")
    stream = Stream(world, PROMPT, request_id="moving")
    stream.wait_tokens(20)
    with world.client() as client:
        try:
            assert client.move("moving", "decode1") == ["decode1"]
        except JmemserveError as error:
            assert "no other instance" in str(error)  # it was measured to be the faster one, and has it already
    stream.wait_tokens(60)
    assert more.end() == 0, "SIGTERM: it gives away what it has and leaves"
    assert stream.result() == truth
    assert world.states()["decode1"] == "left"
    with world.client() as client:
        assert client.cluster().moves >= 1
        with pytest.raises(UnknownRequest, match="no instance 'decode1' is ready"):
            client.drain_instance("decode1")
    nothing_held(world)


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_the_stream_goes_on_when_its_instance_is_lost(world: World, truth: list[int], fault: str) -> None:
    victim = world.join("colocated", f"victim-{fault}")
    victim.wait_for("is a member")
    stream = Stream(world, PROMPT, request_id="survivor")
    stream.wait_tokens(10)
    with world.client() as client:
        try:
            client.move("survivor", f"victim-{fault}")
        except JmemserveError as error:
            assert "no other instance" in str(error)  # it is there already
    stream.wait_tokens(40)
    if fault == "kill":
        victim.end(signal.SIGKILL)
    else:
        victim.popen.send_signal(signal.SIGSTOP)
    assert stream.result() == truth
    if fault == "pause":
        world.wait_state(f"victim-{fault}", "dead")
        victim.popen.send_signal(signal.SIGCONT)
        world.wait_state(f"victim-{fault}", "ready")  # another life, its cache kept
        assert Stream(world, PROMPT).result() == truth
        nothing_held(world)
        assert victim.end() == 0
    nothing_held(world)


def test_roles_change_and_either_kind_is_enough(world: World, truth: list[int]) -> None:
    with world.client() as client:
        client.set_role("prefill0", "decode")
        limit = time.monotonic() + START_S
        while {m.name: m.role for m in client.cluster().members}["prefill0"] != "decode":
            assert time.monotonic() < limit
            time.sleep(0.05)
        assert Stream(world, PROMPT).result() == truth
        client.set_role("prefill0", "prefill")
        while {m.name: m.role for m in client.cluster().members}["prefill0"] != "prefill":
            assert time.monotonic() < limit
            time.sleep(0.05)
        with pytest.raises(JmemserveError, match="role"):
            client.set_role("prefill0", "captain")
    assert Stream(world, PROMPT).result() == truth


def test_instances_join_again_when_the_front_end_comes_back(world: World, truth: list[int]) -> None:
    """A killed front-end is started anew at its port; its instances come by themselves, with what they cached."""
    port = world.address.rpartition(":")[2]
    world.frontend.end(signal.SIGKILL)
    world.frontend = world.start("frontend-again", "--role", "frontend", "--port", port)
    world.frontend.wait_for("ready; try")
    world.wait_state("prefill0", "ready")
    world.wait_state("decode0", "ready")
    with world.client() as client:
        [output] = client.generate(PROMPT, LONG)
        assert list(output.tokens) == truth
        assert output.usage.cached_tokens == 48
    nothing_held(world)
