"""Links between instances of one process: who hears of their end, and which of them stay when others join."""

from unittest import mock

from sim_device import AtOnce, Threads

from jmemserve.config import Role
from jmemserve.engine import links
from jmemserve.engine.links import Exchange, LocalLinks, Neighbours
from jmemserve.kvpool import transfer as tx
from jmemserve.scheduler.messages import Member, MemberState, Roster


class _Side:
    def __init__(self, name: str, epoch: int, exchange: Exchange):
        self.name, self.epoch, self.down = name, epoch, []
        self.links = LocalLinks(name, self, exchange)

    def hello(self) -> tx.Hello:
        return tx.Hello(self.name, self.epoch, "", {})

    def accept(self, hello: tx.Hello) -> str:
        return hello.instance

    def knows(self, peer: str) -> bool:
        return True

    def on_message(self, message: object) -> None: ...

    def on_down(self, peer: str) -> None:
        self.down.append(peer)

    def member(self) -> Member:
        return Member(self.name, self.epoch, Role.COLOCATED, MemberState.READY, self.links.address)


def test_both_ends_of_a_dropped_link_hear_of_it():
    exchange = Exchange()
    a, b = _Side("a", 1, exchange), _Side("b", 2, exchange)
    b.links.connect(a.links.address)
    b.links.drop("a")
    b.links.drop("a")
    assert (a.down, b.down, a.links.peers(), b.links.peers()) == (["b"], ["a"], [], [])


def test_a_link_that_a_new_life_made_is_not_taken_for_that_of_the_former_one():
    exchange = Exchange()
    old, b = _Side("a", 1, exchange), _Side("b", 2, exchange)
    with mock.patch.object(links, "threading", Threads), mock.patch.object(links, "ThreadPoolExecutor", AtOnce):
        neighbours = Neighbours("b", b.links, lambda: b.epoch)
    neighbours._arrange(Roster(1, (old.member(), b.member())))
    assert b.links.peers() == ["a"]
    old.links.close()
    neighbours._arrange(Roster(2, (b.member(),)))
    new = _Side("a", 3, exchange)
    new.links.connect(b.links.address)  # the younger one dials
    neighbours._arrange(Roster(3, (new.member(), b.member())))
    assert new.down == [] and b.links.peers() == ["a"]
