"""The transfer machines in any disorder: whatever happens, nobody reads another's bytes and nothing stays held."""

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from transfer_world import TIMEOUT_S, TO_SOURCE, C, Side

from jmemserve.kvpool import transfer as tx
from jmemserve.kvpool.address import BlockAddress

WEATHER = "offer offer deliver deliver deliver deliver deliver drop double late tick abort stream write tidy alloc kill"
CLAIM, NONE = tx.Flags.CLAIM, tx.Flags.NONE
FLAGS = [CLAIM, NONE, CLAIM | tx.Flags.MIXED, NONE | tx.Flags.DRAM, CLAIM | tx.Flags.ALL_BLOCKS | tx.Flags.NO_CHECKSUM]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_disorder_ends_with_nothing_held(data: st.DataObject) -> None:
    Disorder(data).go(40)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(st.data())
def test_any_disorder_for_long(data: st.DataObject) -> None:
    Disorder(data).go(60)


class Disorder:
    """Messages are dropped, doubled, delayed and reordered, bytes corrupted; time passes; transfers are aborted; blocks
    stream; prefixes are deleted and split under way; either side is killed and comes back in another life."""

    def __init__(self, data: st.DataObject):
        self.draw = data.draw
        self.blocks_of_d = self.draw(st.integers(4, 24))
        self.quota_of_d = self.draw(st.sampled_from([None, None, (3, 2)]))
        self.now = 0.0
        self.p, self.d = self.source(1), self.destination(1)
        self.air: list[tuple[str, tx.Message]] = []  # to whom
        self.everything: list[tuple[str, tx.Message]] = []
        self.answers: dict[str, str] = {}  # transfer id -> the message that ended it at the source
        self.streams: dict[str, tuple[int, int, bytes | None]] = {}  # id -> ready, blocks, private part to come
        self.ids: list[str] = []
        self.theirs: list[tuple[BlockAddress, ...]] = []  # allocated at the destination for the source

    def source(self, epoch: int) -> Side:
        return Side("p", 24, epoch)

    def destination(self, epoch: int) -> Side:
        return Side("d", self.blocks_of_d, epoch, max_in_flight=3, dram_blocks=8, quota=self.quota_of_d)

    def go(self, most: int) -> None:
        steps = {what: getattr(self, what) for what in set(WEATHER.split())}
        for _ in range(self.draw(st.integers(5, most))):
            steps[self.draw(st.sampled_from(WEATHER.split()))]()
            self.p.check()
            self.d.check()
        self.agree()
        self.calm()

    def fly(self, to: str, messages: list[tx.Message]) -> None:
        self.air.extend((to, message) for message in messages)
        self.everything.extend((to, message) for message in messages)

    # -- what can happen -----------------------------------------------------------------------------------------------

    def offer(self) -> None:
        if self.p.pool.room() < 4:
            return
        draw = self.draw
        tokens = [draw(st.integers(0, 1)), *range(1, draw(st.integers(1, 16)))]
        targets = draw(st.sampled_from([(), *self.theirs]))
        tokens = tokens[: len(targets) * C] if targets else tokens
        more = {}
        private = b"" if draw(st.booleans()) else b"secret"
        if streams := draw(st.booleans()):
            more = {"ready": 0, "private": draw(st.sampled_from([None, private]))}
        offer = self.p.offer(
            tokens,
            now=self.now,
            flags=draw(st.sampled_from(FLAGS)),
            insert=draw(st.sampled_from([True, True, False])),
            parts=draw(st.sampled_from([1, 2])),
            targets=targets[: -(-len(tokens) // C)],
            **({"private": private} | more),
        )
        if streams:
            self.streams[offer.transfer_id] = 0, offer.num_blocks, private if more["private"] is None else None
        self.ids.append(offer.transfer_id)
        self.fly("d", [offer])

    def stream(self) -> None:
        if not self.streams:
            return
        transfer_id = self.draw(st.sampled_from(sorted(self.streams)))
        ready, total, private = self.streams.pop(transfer_id)
        ready = self.draw(st.integers(ready, total))
        self.fly("d", self.p.do(self.p.sender.more(transfer_id, ready, self.now), self.now))
        if private is not None and self.draw(st.booleans()):  # perhaps before the last block is ready
            self.fly("d", self.p.do(self.p.sender.close(transfer_id, private, self.now), self.now))
            private = None
        if ready < total or private is not None:
            self.streams[transfer_id] = ready, total, private

    def write(self) -> None:
        """Writes at the destination take time, and end in any order."""
        writing = self.d.writing
        self.d.slow = not self.d.slow
        while writing and self.draw(st.booleans()):
            self.fly("p", self.d.land(writing.pop(self.draw(st.integers(0, len(writing) - 1))), self.now))

    def alloc(self) -> None:
        """The source gets blocks at the destination, or gives some back, whatever is on its way to them."""
        count = self.draw(st.integers(1, 3))
        if self.d.pool.room() >= count:
            self.theirs.append(tuple(self.d.pool.alloc_mem(count, owner="p")))
        elif self.theirs:
            self.d.pool.free_mem(self.theirs.pop(), owner="p")

    def tidy(self) -> None:
        pool = self.d.pool
        pool.delete([self.draw(st.integers(0, 1)), *range(1, C)])
        prefix = [0, *range(1, C), *range(50, 50 + C)][: min(2, pool.room()) * C]
        branch = self.d.write(prefix)
        pool.insert(prefix, branch)  # splits what it meets
        pool.free_mem(branch)

    def kill(self) -> None:
        who = self.draw(st.sampled_from(["", "", "p", "d"]))
        if who == "p":
            self.d.receiver.drop_peer("p")
            self.d.pool.free_owned_by("p")
            self.p = self.source(self.p.pool.epoch + 1)
            self.streams.clear()
            self.ids.clear()
        elif who == "d":
            self.p.sender.drop_peer("d")
            self.d = self.destination(self.d.pool.epoch + 1)
        if who:
            self.answers.clear()  # who is dead agrees with nobody
            self.p.sender.ended.clear()
            self.theirs.clear()

    def tick(self) -> None:
        self.now += self.draw(st.sampled_from([1.0, 6.0]))
        self.fly("d", [send.message for send in self.p.sender.expire(self.now)])
        self.fly("p", [send.message for send in self.d.receiver.expire(self.now)])

    def abort(self) -> None:
        if not self.ids:
            return
        victim = self.draw(st.sampled_from(self.ids))
        if self.draw(st.booleans()):
            self.fly("d", [send.message for send in self.p.sender.abort(victim)])
        else:
            self.fly("p", [send.message for send in self.d.receiver.abort(victim)])

    def late(self) -> None:
        if self.everything:
            self.air.append(self.draw(st.sampled_from(self.everything)))

    def drop(self) -> None:
        if self.air:
            self.air.pop(self.draw(st.integers(0, len(self.air) - 1)))

    def deliver(self, keep: bool = False) -> None:
        if not self.air:
            return
        position = self.draw(st.integers(0, len(self.air) - 1))
        to, message = self.air[position]
        if not keep:
            self.air.pop(position)
        if isinstance(message, tx.Data) and self.draw(st.integers(0, 9)) == 0:
            message = dataclasses.replace(message, ticket={"bytes": None})  # its bytes will come corrupted
        side, other = (self.p, "d") if to == "p" else (self.d, "p")  # whoever has the address now
        known = isinstance(message, TO_SOURCE) and self.p.sender.has(message.transfer_id)
        self.fly(other, side.handle(message, self.now, piece=self.draw(st.integers(1, 3))))
        if known and not self.p.sender.has(message.transfer_id):
            self.answers[message.transfer_id] = type(message).__name__

    def double(self) -> None:
        self.deliver(keep=True)

    # -- the end -------------------------------------------------------------------------------------------------------

    def agree(self) -> None:
        """The two sides agree whenever the source got an answer."""
        arrived = {arrived.transfer_id for arrived in self.d.arrived}
        for transfer_id, how in self.answers.items():
            assert (how == "Done") == (transfer_id in arrived), f"{transfer_id}: {how}, {arrived}"

    def calm(self) -> None:
        """Everybody finishes; what the source has at the destination is what it knows of, but for answers that were
        lost, and those end with its lease."""
        p, d = self.p, self.d
        while d.writing:
            d.land(d.writing.pop(), self.now)
        for _ in range(2):
            self.now += 2 * TIMEOUT_S
            for send in p.sender.expire(self.now):
                d.handle(send.message, self.now)
            d.receiver.expire(self.now)
        for _, error, targets, ours in p.sender.ended:
            if error is None and ours:
                d.pool.free_mem(targets, owner="p")
        for targets in self.theirs:
            d.pool.free_mem(targets, owner="p")
        d.pool.free_owned_by("p")
        p.check_quiet()
        d.check_quiet()
