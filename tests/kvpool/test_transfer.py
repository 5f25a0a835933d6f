"""The transfer machines: the orderly way, every disorderly one, and the field's lessons that apply."""

import dataclasses
from collections import deque

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jmemserve.kvpool import BlockPool, Medium
from jmemserve.kvpool import transfer as tx

C = 4
TIMEOUT_S = 10.0


class Side:
    """One instance: its pool, both tables, and what its 'device' would hold per block, part by part."""

    def __init__(self, name: str, num_blocks: int = 16, epoch: int = 1, max_in_flight: int = 8, dram_blocks: int = 0):
        self.name = name
        self.pool = BlockPool(name, epoch, num_blocks, C, dram_blocks)
        self.sender = tx.Sender(self.pool)
        self.receiver = tx.Receiver(self.pool, timeout_s=TIMEOUT_S, max_in_flight=max_in_flight)
        self.bytes: dict[tuple, object] = {}  # (medium, index, part) -> prefix that the bytes stand for
        self.claimed: dict[str, list] = {}
        self.arrived: list[tx.Arrived] = []
        self.writing: list[tx.Land] = []  # begun and not over, while `slow`
        self.slow = False

    def write(self, tokens):
        """Blocks with these tokens' contents, held."""
        addresses = self.pool.alloc_mem(-(-len(tokens) // C))
        for number, address in enumerate(addresses):
            for part in (tx.WHOLE, 0, 1):
                self.bytes[address.medium, address.index, part] = tuple(tokens[: (number + 1) * C])
        return addresses

    def offer(self, tokens, to="d", now=0.0, flags=tx.Flags.CLAIM, insert=True, **kwargs):
        blocks = self.write(tokens)
        whole = len(tokens) // C
        self.pool.insert(tokens[: whole * C], blocks[:whole])
        kwargs.setdefault("private", repr(list(tokens)).encode())
        return self.sender.start(
            destination=to,
            tokens=tuple(tokens),
            insert=insert,
            blocks=blocks,
            now=now,
            timeout_s=TIMEOUT_S,
            flags=flags,
            **kwargs,
        )

    def handle(self, message, now, piece=2):
        """Do what an engine does; returns what goes to the other side."""
        if isinstance(message, tx.Accept | tx.Refuse | tx.Done | tx.Landed):
            return self.do(self.sender.on(message, now), now, piece)
        return self.do(self.receiver.on(message, now), now, piece)

    def do(self, work, now, piece=2):
        out = []
        for item in work:
            match item:
                case tx.Send():
                    out.append(item.message)
                case tx.Ship():
                    out += self.ship(item, now, piece)
                case tx.Land():
                    if self.slow:
                        self.writing.append(item)
                    else:
                        out += self.land(item, now)
                case tx.Arrived():
                    self.arrive(item)
        return out

    def ship(self, ship, now, piece):
        out = []
        parts = self.sender._transfers[ship.transfer_id].offer.parts
        for part in [tx.WHOLE] if parts == 1 else range(parts):
            for start in range(0, len(ship.sources), piece):
                sources = ship.sources[start : start + piece]
                ticket = {"bytes": [self.bytes[a.medium, a.index, part] for a in sources]}
                first = ship.start + start
                work = self.sender.data(ship.transfer_id, first, first + len(sources), part, ticket, now)
                out += self.do(work, now, piece)
        return out

    def land(self, land, now):
        """The write is over; a ticket without bytes is one that failed."""
        if land.ticket["bytes"] is None:
            return self.do(self.receiver.failed(land, "corrupt"), now)
        for block, content in zip(land.blocks, land.ticket["bytes"], strict=True):
            self.bytes[block.medium, block.index, land.part] = content
        return self.do(self.receiver.landed(land, now), now)

    def arrive(self, arrived):
        self.arrived.append(arrived)
        if not arrived.blocks:
            return
        assert arrived.transfer_id not in self.claimed, "adopted twice"
        tokens = eval(arrived.private)
        for number, block in enumerate(arrived.blocks):
            expected = tuple(tokens[: (number + 1) * C])
            got = {self.bytes.get((block.medium, block.index, part)) for part in (tx.WHOLE, 0)}
            assert expected in got, f"somebody else's bytes: {expected} not in {got}"
        self.claimed[arrived.transfer_id] = list(arrived.blocks)

    def free_claimed(self):
        for blocks in self.claimed.values():
            self.pool.free_mem(blocks)
        self.claimed.clear()

    def check_quiet(self):
        self.free_claimed()
        self.pool.check()
        assert (len(self.sender), len(self.receiver), self.pool.held) == (0, 0, 0), repr(self.pool)


def sides(**kwargs):
    return Side("p"), Side("d", **kwargs)


def run(p, d, offer, now=0.0):
    """Deliver everything in order; returns all messages."""
    log, queue = [], deque([(d, offer)])
    while queue:
        side, message = queue.popleft()
        log.append(message)
        queue.extend((p if side is d else d, answer) for answer in side.handle(message, now))
    return log


def kinds(log):
    return [type(message).__name__ for message in log]


def test_the_orderly_way_moves_a_sequence():
    p, d = sides()
    tokens = [*range(18)]
    log = run(p, d, p.offer(tokens))
    assert kinds(log) == ["Offer", "Accept", *["Data"] * 3, "Close", *["Landed"] * 3, "Done"]
    assert d.pool.peek([*tokens, 0]) == 16  # whole blocks are findable, the part-filled one is not
    assert d.pool.held == 5 and p.pool.held == 0
    assert (p.sender.dropped, d.receiver.dropped) == (0, 0)
    p.check_quiet()
    d.check_quiet()


def test_only_what_is_lacking_moves():
    p, d = sides()
    run(p, d, p.offer([*range(12)]))
    log = run(p, d, p.offer([*range(20)]))
    assert [(data.start, data.stop) for data in log if isinstance(data, tx.Data)] == [(3, 5)]
    assert next(message for message in log if isinstance(message, tx.Accept)).have == 3
    log = run(p, d, p.offer([*range(20)]))
    assert kinds(log) == ["Offer", "Accept", "Close", "Done"]
    assert d.pool.stats().query_tokens == 0  # transfers are no look-ups of prompts
    p.check_quiet()
    d.check_quiet()


def test_a_full_destination_refuses():
    p, d = sides(num_blocks=2)
    log = run(p, d, p.offer([*range(18)]))
    assert kinds(log) == ["Offer", "Refuse"] and "5 blocks needed" in log[1].reason
    p.check_quiet()
    d.check_quiet()


def test_more_than_max_in_flight_are_refused():
    p, d = sides(max_in_flight=1)
    assert isinstance(d.handle(p.offer([1, 2]), 0.0)[0], tx.Accept)
    assert isinstance(d.handle(p.offer([3, 4]), 0.0)[0], tx.Refuse)


def test_an_offer_whose_numbers_disagree_is_refused():
    p, d = sides()
    bad = dataclasses.replace(p.offer([*range(18)]), num_blocks=3)
    assert isinstance(d.handle(bad, 0.0)[0], tx.Refuse)
    assert d.pool.held == 0


def test_tokens_are_findable_only_after_the_bytes_are_in_place():
    p, d = sides()
    d.slow = True
    tokens = [*range(12)]
    [accept] = d.handle(p.offer(tokens), 0.0)
    data, close = p.handle(accept, 0.0, piece=3)
    assert d.handle(data, 0.0) == d.handle(close, 0.0) == [] and d.pool.peek([*tokens, 0]) == 0
    [land] = d.writing
    landed, done = d.land(land, 0.0)
    assert (type(landed), type(done)) == (tx.Landed, tx.Done) and d.pool.peek([*tokens, 0]) == 12
    p.handle(done, 0.0)
    p.check_quiet()
    d.check_quiet()


def test_lesson_1_blocks_stay_out_of_other_hands_while_somebody_writes():
    p, d = sides(num_blocks=3)
    d.slow = True
    offer = p.offer([*range(12)])
    [accept] = d.handle(offer, 0.0)
    first, second, third, _ = p.handle(accept, 0.0, piece=1)
    d.handle(first, 0.0)
    d.handle(second, 0.0)
    [answer] = d.receiver.on(tx.Cancel(offer.transfer_id, "p", "changed my mind"), 0.0)
    assert isinstance(answer.message, tx.Refuse)
    d.receiver.expire(1e9)
    assert d.pool.room() == 0
    assert d.land(d.writing[0], 0.0) == []
    assert d.pool.room() == 0
    assert d.handle(third, 0.0) == [] and d.receiver.dropped == 1
    assert d.land(d.writing[1], 0.0) == []
    assert d.pool.free == 3 and d.pool.peek([*range(12), 0]) == 0
    d.check_quiet()


def test_lesson_8_a_write_that_failed_ends_that_transfer_alone():
    p, d = sides()
    d.slow = True
    good, bad = p.offer([*range(12)]), p.offer([*range(50, 62)])
    [accept_good], [accept_bad] = d.handle(good, 0.0), d.handle(bad, 0.0)
    for message in (*p.handle(accept_good, 0.0), *p.handle(accept_bad, 0.0)):
        d.handle(message, 0.0)
    broken = next(land for land in d.writing if land.transfer_id == bad.transfer_id)
    d.writing.remove(broken)
    [refuse] = d.do(d.receiver.failed(broken, "checksums differ"), 0.0)
    assert isinstance(refuse, tx.Refuse) and "checksums" in refuse.reason
    p.handle(refuse, 0.0)
    assert d.pool.held == 6  # the other write of the failed transfer is still under way
    for land in d.writing:
        for message in d.land(land, 0.0):
            p.handle(message, 0.0)
    assert d.pool.peek([*range(12), 0]) == 12 and d.pool.peek([*range(50, 62), 0]) == 0
    assert [error is None for _, error, _, _ in p.sender.ended] == [False, True]
    p.check_quiet()
    d.check_quiet()


def test_lesson_2_a_dead_source_leaves_nothing_behind():
    p, d = sides()
    [accept] = d.handle(p.offer([*range(12)]), 0.0)
    for data in p.handle(accept, 0.0, piece=1)[:1]:
        d.handle(data, 0.0)
    assert d.pool.held == 3
    assert len(d.receiver.drop_peer("p")) == 1 and d.receiver.drop_peer("p") == []
    d.check_quiet()
    d.handle(p.offer([*range(12)]), 0.0)
    assert len(p.sender.drop_peer("d")) == 2
    p.check_quiet()


def test_lesson_3_every_state_has_a_deadline():
    p, d = sides()
    lost = p.offer([1, 2, 3], now=0.0)  # nobody answers
    assert p.sender.expire(TIMEOUT_S - 0.1) == []
    assert [send.message.transfer_id for send in p.sender.expire(TIMEOUT_S)] == [lost.transfer_id]
    p.check_quiet()

    offer = p.offer([1, 2, 3], now=20.0)  # accepted, no data comes
    [accept] = d.handle(offer, 20.0)
    [send] = d.receiver.expire(20.0 + TIMEOUT_S)
    assert isinstance(send.message, tx.Refuse)
    d.check_quiet()
    p.handle(accept, 20.0)  # data goes out, the answer is the refusal
    p.handle(send.message, 30.0)
    p.check_quiet()


def test_a_source_without_answer_asks_before_it_believes_in_failure():
    p, d = sides()
    [accept] = d.handle(p.offer([*range(6)]), 0.0)
    data, close = p.handle(accept, 0.0)
    d.handle(data, 0.0)
    [_lost_done] = d.handle(close, 0.0)
    [ask] = p.sender.expire(TIMEOUT_S)
    assert isinstance(ask.message, tx.Cancel) and p.sender.has(ask.message.transfer_id)
    [answer] = d.handle(ask.message, TIMEOUT_S)
    assert isinstance(answer, tx.Done) and len(d.claimed) == 1
    p.handle(answer, TIMEOUT_S)
    p.check_quiet()

    [accept] = d.handle(p.offer([*range(30, 36)], now=50.0), 50.0)
    lost_data, lost_close = p.handle(accept, 50.0)
    [ask] = p.sender.expire(50.0 + TIMEOUT_S)
    [answer] = d.handle(ask.message, 60.0)
    assert isinstance(answer, tx.Refuse)
    assert d.handle(lost_data, 60.0) == d.handle(lost_close, 60.0) == []
    p.handle(answer, 60.0)
    p.check_quiet()

    [accept] = d.handle(p.offer([*range(60, 66)], now=100.0), 100.0)
    p.handle(accept, 100.0)
    assert len(p.sender.expire(100.0 + TIMEOUT_S)) == 1 and len(p.sender) == 1
    assert p.sender.expire(100.0 + 2 * TIMEOUT_S) == [] and len(p.sender) == 0  # the peer is silent
    p.check_quiet()
    d.receiver.expire(1e9)
    d.check_quiet()


def test_lesson_4_late_and_unknown_messages_are_counted_and_dropped():
    p, d = sides()
    offer = p.offer([*range(6)])
    log = run(p, d, offer)
    for message in log:
        assert (d if isinstance(message, tx.Offer | tx.Data | tx.Close) else p).handle(message, 1.0) == []
    assert p.sender.dropped + d.receiver.dropped == len(log)
    for wrong in (tx.Landed("?", 0, 0), tx.Accept("?", 1, 0, ()), tx.Done("?"), tx.Refuse("?", "")):
        assert p.handle(wrong, 1.0) == []
    for wrong in (tx.Data("?", 1, 0, 1, 0, {}), tx.Close("?", 1, b""), tx.Renew("p", 1, ())):
        assert d.handle(wrong, 1.0) == []
    [answer] = d.handle(tx.Cancel("?", "p", "no"), 1.0)
    assert isinstance(answer, tx.Refuse)
    p.check_quiet()
    d.check_quiet()


def test_a_cancel_that_overtakes_its_offer_ends_it():
    p, d = sides()
    offer = p.offer([*range(6)])
    [cancel] = p.sender.abort(offer.transfer_id)
    assert p.sender.abort(offer.transfer_id) == []
    d.handle(cancel.message, 0.0)
    assert d.handle(offer, 0.0) == []
    p.check_quiet()
    d.check_quiet()


def test_the_receiver_can_give_up():
    p, d = sides()
    offer = p.offer([*range(6)])
    d.handle(offer, 0.0)
    [send] = d.receiver.abort(offer.transfer_id)
    assert d.receiver.abort(offer.transfer_id) == []
    p.handle(send.message, 0.0)
    p.check_quiet()
    d.check_quiet()


@pytest.mark.parametrize("start, stop", [(0, 4), (1, 3), (2, 1), (2, 2), (-1, 1)])
def test_data_with_wrong_numbers_is_dropped(start, stop):
    p, d = sides()
    run(p, d, p.offer([*range(4)]))
    [accept] = d.handle(p.offer([*range(12)]), 0.0)  # has 1, lacks 1 and 2
    data, close = p.handle(accept, 0.0)
    if (start, stop) == (1, 3):
        bad = dataclasses.replace(data, epoch=2)
    else:
        bad = dataclasses.replace(data, start=start, stop=stop)
    assert d.receiver.on(bad, 0.0) == [] and d.receiver.dropped == 1
    assert d.receiver.on(dataclasses.replace(data, part=1), 0.0) == [] and d.receiver.dropped == 2
    assert d.handle(close, 0.0) == [] and d.receiver.dropped == 3  # before its data
    assert [type(message) for message in (*d.handle(data, 0.0), *d.handle(close, 0.0))] == [tx.Landed, tx.Done]


def test_lesson_9_a_transferred_block_keeps_its_pin_when_its_prefix_is_deleted():
    p, d = sides(num_blocks=4)
    run(p, d, p.offer([*range(8)]))
    d.free_claimed()
    [accept] = d.handle(p.offer([*range(10)]), 0.0)
    assert accept.have == 2
    d.pool.delete([*range(4)])
    assert d.pool.room() == 1
    for data in p.handle(accept, 0.0):
        d.handle(data, 0.0)
    assert len(d.claimed) == 1
    d.check_quiet()


def test_lesson_10_deadlines_need_no_traffic():
    p, d = sides()
    d.handle(p.offer([*range(12)]), 0.0)
    p.sender.expire(1e9)
    d.receiver.expire(1e9)
    p.check_quiet()
    d.check_quiet()


def test_lesson_14_a_restarted_source_voids_its_former_life():
    p, d = sides()
    old = p.offer([*range(6)])
    [accept] = d.handle(old, 0.0)
    again = Side("p", epoch=2)
    new = again.offer([*range(6)])
    assert new.transfer_id != old.transfer_id
    assert isinstance(d.handle(new, 0.0)[0], tx.Accept)
    assert len(d.receiver) == 1  # the old one was ended
    assert again.handle(accept, 0.0) == [] and again.sender.dropped == 1
    for data in p.handle(accept, 0.0):
        assert d.handle(data, 0.0) == []
    assert d.handle(p.offer([9]), 0.0) == []  # an offer of the former life


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_disorder_ends_with_nothing_held(data):
    disorder(data)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(st.data())
def test_any_disorder_for_long(data):
    disorder(data)


def disorder(data):
    """Messages are dropped, doubled, delayed and reordered, bytes corrupted; time passes; transfers are aborted; blocks
    stream; prefixes are deleted and split under way; either side is killed and comes back in another life."""
    draw, blocks_of_d = data.draw, data.draw(st.integers(4, 24))
    p, d = Side("p", num_blocks=24), Side("d", num_blocks=blocks_of_d, max_in_flight=3, dram_blocks=8)
    air: list[tuple[Side, object]] = []
    everything: list[tuple[Side, object]] = []
    ended_at_p: dict[str, str] = {}
    open_streams: dict[str, int] = {}  # id -> blocks, begun with none of them ready
    now, ids = 0.0, []

    def fly(side, messages):
        air.extend((side, message) for message in messages)
        everything.extend((side, message) for message in messages)

    weather = "offer deliver deliver deliver deliver drop double late tick abort stream write tidy kill".split()
    for _ in range(draw(st.integers(5, 40))):
        what = draw(st.sampled_from(weather))
        if what == "offer" and p.pool.room() >= 4:
            length = draw(st.integers(1, 16))
            branch = draw(st.integers(0, 1))
            flags = draw(st.sampled_from([tx.Flags.CLAIM, tx.Flags.CLAIM | tx.Flags.MIXED]))
            stream = {"ready": 0} if draw(st.booleans()) else {}
            tokens = [branch, *range(1, length)]
            offer = p.offer(tokens, now=now, flags=flags, parts=draw(st.sampled_from([1, 2])), **stream)
            if stream:
                open_streams[offer.transfer_id] = offer.num_blocks
            ids.append(offer.transfer_id)
            fly(d, [offer])
        elif what == "stream" and open_streams:
            stream = draw(st.sampled_from(sorted(open_streams)))
            fly(d, p.do(p.sender.more(stream, open_streams.pop(stream), now), now))
        elif what == "write":  # writes at the destination take time, and end in any order
            d.slow = not d.slow
            while d.writing and draw(st.booleans()):
                fly(p, d.land(d.writing.pop(draw(st.integers(0, len(d.writing) - 1))), now))
        elif what == "tidy":
            d.pool.delete([draw(st.integers(0, 1)), *range(1, C)])
            prefix = [0, *range(1, C), *range(50, 50 + C)][: min(2, d.pool.room()) * C]
            branch = d.write(prefix)
            d.pool.insert(prefix, branch)  # splits what it meets
            d.pool.free_mem(branch)
        elif what == "kill" and draw(st.booleans()):
            gone = "p" if draw(st.booleans()) else "d"
            if gone == "p":
                d.receiver.drop_peer("p")
                p, ids = Side("p", num_blocks=24, epoch=p.pool.epoch + 1), []
                open_streams.clear()
            else:
                p.sender.drop_peer("d")
                d = Side("d", num_blocks=blocks_of_d, epoch=d.pool.epoch + 1, max_in_flight=3, dram_blocks=8)
            ended_at_p.clear()  # who is dead agrees with nobody
        elif what == "tick":
            now += draw(st.sampled_from([1.0, 6.0]))
            fly(d, [send.message for send in p.sender.expire(now)])
            fly(p, [send.message for send in d.receiver.expire(now)])
        elif what == "abort" and ids:
            victim = draw(st.sampled_from(ids))
            if draw(st.booleans()):
                fly(d, [send.message for send in p.sender.abort(victim)])
            else:
                fly(p, [send.message for send in d.receiver.abort(victim)])
        elif what == "late" and everything:
            air.append(draw(st.sampled_from(everything)))
        elif air:
            position = draw(st.integers(0, len(air) - 1))
            side, message = air[position]
            if what != "double":
                air.pop(position)
            side = p if side.name == "p" else d  # whoever has the address now
            if isinstance(message, tx.Data) and draw(st.integers(0, 9)) == 0:
                message = dataclasses.replace(message, ticket={"bytes": None})  # its bytes will come corrupted
            if what != "drop":
                known = side is p and p.sender.has(message.transfer_id)
                fly(p if side is d else d, side.handle(message, now, piece=draw(st.integers(1, 3))))
                if known and not p.sender.has(message.transfer_id):
                    ended_at_p[message.transfer_id] = type(message).__name__
        for side in (p, d):
            side.pool.check()
    for transfer_id, how in ended_at_p.items():  # the two sides agree whenever the source got an answer
        assert (how == "Done") == (transfer_id in d.claimed), f"{transfer_id}: {how}, {list(d.claimed)}"
    while d.writing:
        d.land(d.writing.pop(), now)
    for _ in range(2):
        now += 2 * TIMEOUT_S
        p.sender.expire(now)
        d.receiver.expire(now)
    p.check_quiet()
    d.check_quiet()


def test_a_doubled_piece_is_written_once():
    p, d = sides()
    [accept] = d.handle(p.offer([*range(12)]), 0.0)
    first, second, _, _ = p.handle(accept, 0.0, piece=1)
    assert [type(m) for m in (*d.handle(first, 0.0), *d.handle(second, 0.0))] == [tx.Landed, tx.Landed]
    assert d.handle(first, 0.0) == [] and d.receiver.dropped == 1
    wide = dataclasses.replace(second, start=1, stop=3)
    assert d.receiver.on(wide, 0.0) == [] and d.receiver.dropped == 2


def test_lesson_9_a_run_that_splits_during_a_transfer_moves_no_pin():
    p, d = sides(num_blocks=8)
    run(p, d, p.offer([*range(16)]))
    d.free_claimed()
    [accept] = d.handle(p.offer([*range(22)]), 0.0)
    assert accept.have == 4
    branch = d.pool.alloc_mem(2)
    d.pool.insert([*range(4), 90, 91, 92, 93], branch)  # parts the run that the transfer holds
    d.pool.free_mem(branch)
    d.pool.alloc_mem(d.pool.room(), owner="x")  # whatever is not held goes
    for message in p.handle(accept, 0.0):
        for answer in d.handle(message, 0.0):
            p.handle(answer, 0.0)
    assert len(d.claimed) == 1
    d.pool.free_owned_by("x")
    p.check_quiet()
    d.check_quiet()


# -- streams, parts, destinations --------------------------------------------------------------------------------------


def test_blocks_travel_while_later_ones_are_still_being_computed():
    p, d = sides()
    tokens = [*range(18)]
    [accept] = d.handle(p.offer(tokens, ready=0, private=None), 0.0)
    assert p.handle(accept, 0.0) == []
    transfer_id = accept.transfer_id
    sent = []
    for ready in (2, 2, 3, 5):
        messages = p.do(p.sender.more(transfer_id, ready, 0.0), 0.0)
        sent += [(message.start, message.stop) for message in messages]
        for message in messages:
            d.handle(message, 0.0)
    assert sent == [(0, 2), (2, 3), (3, 5)] and not d.claimed
    [close] = p.do(p.sender.close(transfer_id, repr(tokens).encode(), 0.0), 0.0)
    [done] = d.handle(close, 0.0)
    p.handle(done, 0.0)
    assert p.sender.more(transfer_id, 5, 0.0) == p.sender.close(transfer_id, b"", 0.0) == []  # it has ended
    p.check_quiet()
    d.check_quiet()


def test_what_was_announced_before_the_answer_is_shipped_after_it():
    p, d = sides()
    offer = p.offer([*range(18)], ready=0)
    assert p.do(p.sender.more(offer.transfer_id, 5, 0.0), 0.0) == []
    run(p, d, offer)
    assert len(d.claimed) == 1
    d.check_quiet()
    p.check_quiet()


@settings(max_examples=30, deadline=None)
@given(st.randoms())
def test_parts_come_in_any_order_and_each_block_once_for_every_part(random):
    p, d = sides()
    tokens = [*range(18)]
    [accept] = d.handle(p.offer(tokens, parts=2), 0.0)
    *data, close = p.handle(accept, 0.0)
    assert len(data) == 6
    random.shuffle(data)
    for number, message in enumerate(data):
        assert d.pool.peek([*tokens, 0]) == 0
        d.handle(message, 0.0)
        assert d.handle(message, 0.0) == [] and d.receiver.dropped == number + 1
    [done] = d.handle(close, 0.0)
    p.handle(done, 0.0)
    p.check_quiet()
    d.check_quiet()


def test_blocks_can_go_where_the_source_has_them_allocated():
    p, d = sides()
    theirs = d.pool.alloc_mem(3, owner="p")
    offer = p.offer([*range(12)], flags=tx.Flags.NONE, insert=False, targets=tuple(theirs))
    log = run(p, d, offer)
    assert kinds(log)[-1] == "Done" and log[1].addresses == tuple(theirs)
    assert [d.bytes[a.medium, a.index, tx.WHOLE][-1] for a in theirs] == [3, 7, 11]
    assert d.pool.owned() == {"p": 3}  # they stay the source's
    assert p.sender.ended[-1][3] is False
    d.pool.free_owned_by("p")
    p.check_quiet()
    d.check_quiet()


@pytest.mark.parametrize("how", ["another's", "nobody's", "stale", "twice", "too few"])
def test_wrong_destinations_are_refused_and_change_nothing(how):
    p, d = sides()
    owner = "q" if how == "another's" else "p"
    theirs = d.pool.alloc_mem(3, owner=None if how == "nobody's" else owner)
    if how == "stale":
        d.pool.free_mem(theirs, owner="p")
    targets = {"twice": (theirs[0], theirs[0], theirs[1]), "too few": tuple(theirs[:2])}.get(how, tuple(theirs))
    before = repr(d.pool)
    log = run(p, d, p.offer([*range(12)], targets=targets))
    assert kinds(log) == ["Offer", "Refuse"] and repr(d.pool) == before
    d.pool.check()
    p.check_quiet()


def test_blocks_under_other_tokens_cannot_be_a_destination_of_an_insert():
    p, d = sides()
    theirs = d.pool.alloc_mem(1, owner="p")
    d.pool.insert([90, 91, 92, 93], theirs)
    log = run(p, d, p.offer([*range(4)], targets=tuple(theirs)))
    assert kinds(log)[-1] == "Refuse" and "other tokens" in log[-1].reason
    d.pool.check()
    d.pool.free_owned_by("p")
    d.check_quiet()


def test_flags_say_where_blocks_land_and_whose_they_are():
    p, d = sides(num_blocks=4, dram_blocks=8)
    run(p, d, p.offer([*range(12)], flags=tx.Flags.DRAM | tx.Flags.CLAIM))
    [blocks] = d.claimed.values()
    assert {block.medium for block in blocks} == {Medium.DRAM}
    d.free_claimed()
    run(p, d, p.offer([*range(50, 74)], flags=tx.Flags.MIXED | tx.Flags.CLAIM))
    [blocks] = d.claimed.values()
    assert [block.medium for block in blocks].count(Medium.HBM) == 4
    d.free_claimed()
    log = run(p, d, p.offer([*range(12)], flags=tx.Flags.CLAIM))
    assert log[1].have == 3  # what lies in DRAM is there
    d.free_claimed()
    log = run(p, d, p.offer([*range(12)], flags=tx.Flags.CLAIM | tx.Flags.ALL_BLOCKS))
    assert log[1].have == 0
    d.free_claimed()
    run(p, d, p.offer([*range(8)], flags=tx.Flags.NONE, private=b"x"))
    assert d.arrived[-1].blocks == () and d.arrived[-1].private == b"x" and d.pool.held == 0
    run(p, d, p.offer([*range(80, 88)], flags=tx.Flags.NONE, insert=False))
    assert d.pool.owned() == {"p": 2} and p.sender.ended[-1][3] is True
    d.pool.free_owned_by("p")
    p.check_quiet()
    d.check_quiet()


def test_checksums_are_asked_for_unless_waived():
    p, d = sides()
    d.slow = True
    for flags in (tx.Flags.NONE, tx.Flags.NO_CHECKSUM):
        [accept] = d.handle(p.offer([*range(4)], flags=flags | tx.Flags.ALL_BLOCKS), 0.0)
        d.handle(p.handle(accept, 0.0)[0], 0.0)
    assert [land.checked for land in d.writing] == [True, False]


def test_a_sign_of_life_renews_the_peers_own_transfers_only():
    p, d = sides()
    mine, others = p.offer([1, 2, 3], now=0.0), p.offer([4, 5, 6], to="e", now=0.0)
    d.handle(mine, 0.0)
    ids = (mine.transfer_id, others.transfer_id, "?")
    p.sender.renew(ids, "d", 8.0)
    d.receiver.renew(ids, "q", 8.0)
    assert [send.message.transfer_id for send in p.sender.expire(TIMEOUT_S)] == [others.transfer_id]
    assert len(d.receiver.expire(TIMEOUT_S)) == 1
    p.sender.expire(1e9)
    p.check_quiet()
    d.check_quiet()
