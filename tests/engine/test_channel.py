"""The channel from a leader to its followers: what arrives, in which order, and who hears of a loss."""

import queue
import threading
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from jmemserve.engine import channel, world
from jmemserve.engine.channel import Follower, Leader, Message, pack, unpack
from jmemserve.engine.world import World
from jmemserve.errors import ConfigError, TransferError

LEADER, FOLLOWER = World("127.0.0.1:1", 2, 0), World("127.0.0.1:1", 2, 1)


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch):
    """Connect both ends in this process; the secret goes by hand instead of by JAX."""
    shared: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    ends: list[Leader | Follower] = []

    def broadcast(data: bytes, size: int) -> bytes:
        if data:
            shared.put(data)
            return data
        return shared.get()

    def call(lost: Callable[[str], None] = pytest.fail, theirs: str = "same", **hooks) -> tuple[Leader, Follower]:
        made: list[Leader] = []

        def lead() -> None:
            try:
                made.append(Leader(LEADER, "same", lost, **hooks))
            except ConfigError as error:
                refused.append(error)

        refused: list[ConfigError] = []
        thread = threading.Thread(target=lead)
        thread.start()
        try:
            follower = Follower(FOLLOWER, theirs, lost)
        finally:
            thread.join()
        assert not refused
        ends.extend((made[0], follower))
        return made[0], follower

    monkeypatch.setattr(channel, "broadcast", broadcast)
    yield call
    for end in ends:
        end._stopping.set()  # neither is to call the other's end a loss
    for end in ends:
        end.close()


def test_a_message_is_what_it_was() -> None:
    arrays = (np.arange(6, dtype=np.int32).reshape(2, 3), np.ones((2, 0), np.float32), jnp.ones(5, jnp.bfloat16))
    message = Message("step", (1, True, (2, 3)), tuple(np.asarray(array) for array in arrays))
    got = unpack(b"".join(pack(message)))
    assert (got.name, got.values) == ("step", (1, True, (2, 3)))
    for sent, came in zip(message.arrays, got.arrays, strict=True):
        assert came.dtype == sent.dtype
        np.testing.assert_array_equal(came, sent)


@pytest.mark.parametrize("change", [lambda f: f[:-1], lambda f: f + b"x", lambda f: b"", lambda f: b"\xff" * 20])
def test_a_broken_frame_is_refused(change: Callable[[bytes], bytes]) -> None:
    frame = b"".join(pack(Message("step", (1,), (np.arange(4),))))
    with pytest.raises(TransferError):
        unpack(change(frame))


def test_objects_do_not_travel() -> None:
    header = b"".join(pack(Message("step", (), (np.zeros(1, "int64"),)))).replace(
        b"\xa5int64", b"\xa1O\xc0\xc0\xc0\xc0"
    )
    with pytest.raises(TransferError):
        unpack(header)


def test_messages_come_in_order_until_the_leader_stops(meet) -> None:
    leader, follower = meet()
    got: list[int] = []

    def read() -> None:
        got.extend(message.values[0] for message in follower.messages())
        follower.close()

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(3 * channel.WAITING):
        leader.send(Message("step", (number,), (np.zeros(1000),)))
    leader.stop()
    reader.join()
    assert got == list(range(3 * channel.WAITING))


def test_who_loses_the_other_hears_of_it_at_once(meet) -> None:
    lost: list[str] = []
    leader, follower = meet(lost.append)
    follower.close()
    wait_for(lambda: lost)
    assert "process 1 of this instance was lost" in lost[0]
    with pytest.raises(TransferError):
        leader.send(Message("step"))
    lost.clear()
    leader, follower = meet(lost.append)
    leader.close()
    wait_for(lambda: lost)
    assert "process 0 of this instance was lost" in lost[0]


def test_silence_is_a_loss(meet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "BEAT_S", 0.05)
    monkeypatch.setattr(channel, "LOST_S", 0.5)
    lost: list[str] = []
    leader, follower = meet(lost.append)
    time.sleep(1.2)
    assert not lost  # nothing was sent but beats
    follower._stopping.set()  # as if it hung
    wait_for(lambda: lost)
    assert "process 1" in lost[0] and "time ran out" in lost[0]


def test_a_follower_that_is_to_end_tells_the_leader(meet) -> None:
    asked = threading.Event()
    _, follower = meet(on_terminate=asked.set)
    follower.ask_to_terminate()
    assert asked.wait(5)


def test_a_follower_that_was_started_otherwise_is_refused(meet, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="process 1 was started otherwise than process 0"):
        meet(theirs="other")


def test_flags_make_a_world() -> None:
    assert world.detect("host:1234", 2, 1) == World("host:1234", 2, 1)
    assert world.detect("host:1234", 1, 0) is None
    for wrong in [("host:1234", 2, None), ("host", 2, 0), ("host:0", 2, 0), ("host:1", 2, 2), (None, 2, 0)]:
        with pytest.raises(ConfigError):
            world.detect(*wrong)
    with pytest.raises(ConfigError, match="cannot share equally"):
        FOLLOWER.local_devices(3)


def test_a_batch_job_is_found_only_if_it_has_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.detect() is None
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node[3-4]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = world.detect()
    assert found is not None and (found.host, found.num_processes, found.process_id) == ("node3", 2, 1)
    assert found.detected and not found.leads
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert world.detect() is None


def wait_for(condition: Callable[[], object], limit_s: float = 10) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)
