"""What the transport through JAX's server adds to it: pulls that end, and peers that are not touched."""

import time

import jax
import numpy as np
import pytest
from transport_ways import make_piece, make_transport, sharding

from jmemserve.errors import TransferError
from jmemserve.kvpool.transports import PieceSpec, jax_pulls
from jmemserve.kvpool.transports.jax_pulls import listens


@pytest.fixture
def pair():
    source, destination = make_transport("jax"), make_transport("jax")
    yield source, destination
    source.close()
    destination.close()


HOST = make_piece(4, "float32", 0)
SPEC = PieceSpec(HOST.shape, "float32", 4)


def publish(source, key):
    return source.publish(key, jax.device_put(HOST, sharding(1)), 4)


def fetch(pair, ticket, timeout_s=5.0):
    source, destination = pair
    got = destination.fetch(source.endpoint(), ticket, SPEC, sharding(1, 1), timeout_s)
    assert np.asarray(got).tobytes() == HOST.tobytes()


def test_a_late_first_pull_is_set_aside_and_ended_when_the_peer_is_well(pair, monkeypatch):
    """Poisoning a connection that is being made would leave the peer's server deaf for everybody."""
    source, destination = pair
    monkeypatch.setattr(jax_pulls, "SETTLED_S", 0.1)
    puller = destination._get_puller()
    with pytest.raises(TransferError, match="in time"):
        fetch(pair, publish(source, "a") | {"uuid": 1}, timeout_s=0.2)
    (aside,) = puller._aside
    leaves = aside.leaves
    fetch(pair, publish(source, "b"))
    assert list(puller._aside) == [aside]
    time.sleep(0.15)
    fetch(pair, publish(source, "c"))
    assert not puller._aside
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(leaves)


def test_a_late_pull_on_a_proven_connection_ends_at_once(pair):
    source, destination = pair
    fetch(pair, publish(source, "a"))
    with pytest.raises(TransferError, match="in time"):
        fetch(pair, publish(source, "b") | {"uuid": 2}, timeout_s=0.2)
    puller = destination._get_puller()
    assert not puller._aside
    assert not any(puller._idle.values())
    fetch(pair, publish(source, "c"))


def test_connections_are_used_again(pair):
    source, destination = pair
    for number in range(5):
        fetch(pair, publish(source, f"k{number}"))
    (idle,) = destination._get_puller()._idle.values()
    assert len(idle) == 1


def test_aside_and_remembered_are_bounded(pair, monkeypatch):
    source, destination = pair
    monkeypatch.setattr(jax_pulls, "MAX_ASIDE", 2)
    monkeypatch.setattr(jax_pulls, "MAX_REMEMBERED", 3)
    for number in range(4):
        with pytest.raises(TransferError):
            fetch(pair, publish(source, f"k{number}") | {"uuid": 100 + number}, timeout_s=0.05)
    puller = destination._get_puller()
    assert len(puller._aside) == 2
    assert list(puller._pulled) == [101, 102, 103]


@pytest.mark.parametrize(
    "change", [{"channels": 1}, {"jaxlib": "0.1"}, {"platform": "tpu"}, {"address": "127.0.0.1:9"}, {"address": 7}]
)
def test_a_server_made_otherwise_is_not_reached(pair, change):
    source, destination = pair
    assert destination.reaches(source.endpoint())
    assert not destination.reaches(source.endpoint() | change)


def test_a_ticket_sends_nobody_elsewhere(pair):
    """Only the address of the peer's endpoint is ever connected to."""
    source, _ = pair
    with pytest.raises(TransferError, match="the peer is at"):
        fetch(pair, publish(source, "a") | {"address": "127.0.0.1:9"})


def test_whether_anybody_listens():
    for address in ("", "x", "127.0.0.1:", "127.0.0.1:9", "127.0.0.1:70000", "no.such.host.invalid:1", ":::"):
        assert not listens(address, 0.2)
