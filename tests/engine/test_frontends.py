"""Who hears what of one instance, with a real pool."""

from jmemserve.engine.frontends import Frontends
from jmemserve.kvpool import BlockPool
from jmemserve.kvpool.events import EventLog
from jmemserve.scheduler.messages import CacheNews, CacheSnapshot, News, Shared, Tokens, attempt_id, frontend_of
from jmemserve.types import Event


class Ear:
    """A front-end that remembers what it is told."""

    def __init__(self) -> None:
        self.heard = []

    def __call__(self, message) -> None:
        self.heard.append(message)

    def take(self) -> list:
        heard, self.heard = self.heard, []
        return heard


def make() -> tuple[Frontends, BlockPool, Ear, list[int]]:
    pool, home, dropped = BlockPool("x", 1, 16, 4, log=EventLog()), Ear(), []
    frontends = Frontends(pool, home, lambda: dropped.append(1))
    frontends.lead("one")
    dropped.clear()
    return frontends, pool, home, dropped


def cache(pool: BlockPool, tokens: list[int]) -> None:
    blocks = pool.alloc_mem(len(tokens) // 4)
    pool.insert(tokens, blocks)
    pool.free_mem(blocks)


def test_ids_of_two_front_ends_differ():
    assert {attempt_id(name, 1, 1) for name in ("", "one", "two")} == {"r1.1", "one/r1.1", "two/r1.1"}
    assert [frontend_of(attempt_id(name, 1, 1)) for name in ("", "one")] == ["", "one"]


def test_answers_go_to_who_asked():
    frontends, _, home, _ = make()
    second = Ear()
    frontends.join("two", second)
    frontends.news([Event("one/r1.1", (1,)), Event("two/r1.1", (2,)), Event("one/r2.1", (3,)), Event("old/r1.1", (4,))])
    frontends.shared(Shared("two/r9.1"))
    assert home.take() == [News((Event("one/r1.1", (1,)), Event("one/r2.1", (3,))))]
    assert second.take() == [News((Event("two/r1.1", (2,)),)), Shared("two/r9.1")]
    assert [frontends.awaits(f"{name}/r1.1") for name in ("one", "two", "old")] == [True, True, False]


def test_columns_of_tokens_are_divided():
    frontends, _, home, _ = make()
    second = Ear()
    frontends.join("two", second)
    ids = "one/r1.1", "two/r1.1", "one/r2.1", "old/r1.1"
    for step in (1, 2):
        frontends.tokens(Tokens(ids, (4, 5, 6, 7), step, (10, 11, 12, 13)))
        told = home.take()
        assert told == [Tokens(("one/r1.1", "one/r2.1"), (4, 6), step, (10, 12))]
        assert told[0].events == [Event(ids[0], (10,), start=4 + step), Event(ids[2], (12,), start=6 + step)]
        assert second.take() == [Tokens(("two/r1.1",), (5,), step, (11,))]
    alone = Tokens(("one/r1.1",), (6,), 1, (10,))
    frontends.tokens(alone)
    assert home.take() == [alone] and second.take() == []


def test_each_is_told_of_the_cache_in_its_own_time():
    frontends, pool, home, _ = make()
    cache(pool, [*range(8)])
    frontends.poll(1.0)
    assert home.take() == [], "not before it is ready there"
    assert frontends.ready() and not frontends.ready()
    frontends.poll(2.0)
    assert [type(message) for message in home.take()] == [CacheSnapshot]
    second = Ear()
    frontends.join("two", second)
    cache(pool, [*range(12)])
    for now in (3.0, 4.0):
        frontends.poll(now)
    assert [type(message) for message in home.take()] == [CacheNews]
    assert [type(message) for message in second.take()] == [CacheSnapshot, CacheNews]
    frontends.tell_cache("two")
    frontends.poll(5.0)
    assert home.take() == []
    assert [type(message) for message in second.take()] == [CacheSnapshot]


def test_what_a_lost_one_asked_for_is_dropped_once():
    frontends, _, _, dropped = make()
    first_way, second_way = Ear(), Ear()
    frontends.join("two", first_way)
    frontends.join("two", second_way)
    assert len(dropped) == 1, "it has come again, and knows nothing of what it asked for by the other way"
    frontends.leave("two", first_way)
    assert len(dropped) == 1 and frontends.awaits("two/r1.1")
    frontends.leave("two", second_way)
    assert len(dropped) == 2 and not frontends.awaits("two/r1.1")
    frontends.leave_home()
    assert len(dropped) == 3 and not frontends.awaits("one/r1.1")
    frontends.lead("three")
    assert frontends.awaits("three/r1.1") and frontends.ready(), "another life of the home hears all anew"
