"""The transfer machines: the orderly way, every disorderly one, and the field's lessons that apply."""

import dataclasses
from collections import deque

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jmemserve.errors import TransferError
from jmemserve.kvpool import BlockPool
from jmemserve.kvpool import transfer as tx

C = 4
TIMEOUT_S = 10.0


class Side:
    """One instance: its pool, both tables, and what its 'device' would hold per block."""

    def __init__(self, name: str, num_blocks: int = 16, epoch: int = 1, max_in_flight: int = 8):
        self.name = name
        self.pool = BlockPool(name, epoch, num_blocks, C)
        self.sender = tx.Sender(self.pool)
        self.receiver = tx.Receiver(self.pool, timeout_s=TIMEOUT_S, max_in_flight=max_in_flight)
        self.bytes: dict[int, object] = {}
        self.claimed: dict[str, list] = {}

    def write(self, tokens):
        """Blocks with these tokens' contents, held."""
        addresses = self.pool.alloc_mem(-(-len(tokens) // C))
        for number, address in enumerate(addresses):
            self.bytes[address.index] = tuple(tokens[: (number + 1) * C])
        return addresses

    def offer(self, tokens, to="d", now=0.0):
        blocks = self.write(tokens)
        whole = len(tokens) // C
        self.pool.insert(tokens[: whole * C], blocks[:whole])
        return self.sender.start(
            destination=to,
            tokens=tuple(tokens),
            blocks=blocks,
            salt="",
            layout="x",
            private=tuple(tokens),
            now=now,
            timeout_s=TIMEOUT_S,
        )

    def handle(self, message, now, piece=2):
        """Do what an engine does; returns what goes to the other side."""
        out = []
        match message:
            case tx.Accept() | tx.Refuse() | tx.Done():
                for ship in self.sender.on(message, now):
                    contents = [self.bytes[block.index] for block in ship.blocks]
                    cuts = range(0, len(contents), piece) if contents else [0]
                    for start in cuts:
                        stop = min(start + piece, len(contents))
                        out.append(self.sender.data(ship.transfer_id, start, stop, contents[start:stop], now))
            case _:
                for action in self.receiver.on(message, now):
                    if isinstance(action, tx.Land):
                        for block, content in zip(action.blocks, action.payload, strict=True):
                            self.bytes[block.index] = content
                        done = self.receiver.landed(action.transfer_id, now)
                        if done:
                            assert action.last
                            self.claim(action.transfer_id)
                        out += [send.message for send in done]
                    else:
                        out.append(action.message)
        return out

    def claim(self, transfer_id):
        private, blocks = self.receiver.claim(transfer_id)
        assert transfer_id not in self.claimed, "adopted twice"
        assert [self.bytes[block.index] for block in blocks] == [
            private[: (number + 1) * C] for number in range(len(blocks))
        ], "somebody else's bytes"
        self.claimed[transfer_id] = blocks

    def check_quiet(self):
        for blocks in self.claimed.values():
            self.pool.free_mem(blocks)
        self.claimed.clear()
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
    assert kinds(log) == ["Offer", "Accept", "Data", "Data", "Data", "Done"]
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
    assert kinds(log) == ["Offer", "Accept", "Data", "Done"]
    assert (log[2].start, log[2].stop) == (5, 5)
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
    tokens = [*range(12)]
    [accept] = d.handle(p.offer(tokens), 0.0)
    pieces = p.handle(accept, 0.0, piece=3)
    [land] = d.receiver.on(pieces[0], 0.0)
    assert land.last and d.pool.peek([*tokens, 0]) == 0
    with pytest.raises(TransferError):
        d.receiver.claim(land.transfer_id)
    [send] = d.receiver.landed(land.transfer_id, 0.0)
    assert send == tx.Send("p", tx.Done(land.transfer_id)) and d.pool.peek([*tokens, 0]) == 12
    _, blocks = d.receiver.claim(land.transfer_id)
    d.pool.free_mem(blocks)


def test_lesson_1_blocks_stay_out_of_other_hands_while_somebody_writes():
    p, d = sides(num_blocks=3)
    offer = p.offer([*range(12)])
    [accept] = d.handle(offer, 0.0)
    [first, second, third] = p.handle(accept, 0.0, piece=1)
    [land] = d.receiver.on(first, 0.0)
    d.receiver.on(second, 0.0)
    [answer] = d.receiver.on(tx.Cancel(offer.transfer_id, "p", "changed my mind"), 0.0)
    assert isinstance(answer.message, tx.Refuse)
    d.receiver.expire(1e9)
    assert d.pool.room() == 0
    assert d.receiver.landed(land.transfer_id, 0.0) == []
    assert d.pool.room() == 0
    assert d.receiver.on(third, 0.0) == [] and d.receiver.dropped == 1
    assert d.receiver.landed(land.transfer_id, 0.0) == []
    assert d.pool.free == 3 and d.pool.peek([*range(12), 0]) == 0
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

    offer = p.offer([1, 2, 3], now=40.0)  # ready, nobody claims
    [accept] = d.handle(offer, 40.0)
    [data] = p.handle(accept, 40.0)
    [land] = d.receiver.on(data, 40.0)
    d.receiver.landed(land.transfer_id, 40.0)
    assert d.receiver.expire(40.0 + TIMEOUT_S) == [] and d.receiver.unclaimed == 1
    d.check_quiet()
    with pytest.raises(TransferError):
        d.receiver.claim(land.transfer_id)


def test_a_source_without_answer_asks_before_it_believes_in_failure():
    p, d = sides()
    [accept] = d.handle(p.offer([*range(6)]), 0.0)
    [data] = p.handle(accept, 0.0)
    [_lost_done] = d.handle(data, 0.0)
    [ask] = p.sender.expire(TIMEOUT_S)
    assert isinstance(ask.message, tx.Cancel) and p.sender.has(ask.message.transfer_id)
    [answer] = d.handle(ask.message, TIMEOUT_S)
    assert isinstance(answer, tx.Done) and len(d.claimed) == 1
    p.handle(answer, TIMEOUT_S)
    p.check_quiet()

    [accept] = d.handle(p.offer([*range(30, 36)], now=50.0), 50.0)
    [lost_data] = p.handle(accept, 50.0)
    [ask] = p.sender.expire(50.0 + TIMEOUT_S)
    [answer] = d.handle(ask.message, 60.0)
    assert isinstance(answer, tx.Refuse)
    assert d.handle(lost_data, 60.0) == []
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
        assert (d if isinstance(message, tx.Offer | tx.Data) else p).handle(message, 1.0) == []
    assert p.sender.dropped + d.receiver.dropped == len(log)
    for wrong in (tx.Data("?", 1, 0, 1, []), tx.Accept("?", 1, 0, ()), tx.Done("?"), tx.Refuse("?", "")):
        assert p.handle(wrong, 1.0) == []
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
    [data] = p.handle(accept, 0.0)
    if (start, stop) == (1, 3):
        bad = dataclasses.replace(data, epoch=2)
    else:
        bad = dataclasses.replace(data, start=start, stop=stop)
    assert d.receiver.on(bad, 0.0) == [] and d.receiver.dropped == 1
    assert [type(message) for message in d.handle(data, 0.0)] == [tx.Done]


def test_lesson_9_a_transferred_block_keeps_its_pin_when_its_prefix_is_deleted():
    p, d = sides(num_blocks=4)
    run(p, d, p.offer([*range(8)]))
    for blocks in d.claimed.values():
        d.pool.free_mem(blocks)
    d.claimed.clear()
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
    """Messages are dropped, doubled, delayed and reordered; time passes; transfers are aborted."""
    p, d = Side("p", num_blocks=24), Side("d", num_blocks=data.draw(st.integers(4, 24)), max_in_flight=3)
    air: list[tuple[Side, object]] = []
    everything: list[tuple[Side, object]] = []
    ended_at_p: dict[str, str] = {}
    now, ids = 0.0, []

    def fly(side, messages):
        air.extend((side, message) for message in messages)
        everything.extend((side, message) for message in messages)

    for _ in range(data.draw(st.integers(5, 40))):
        what = data.draw(st.sampled_from("offer deliver deliver deliver deliver drop double late tick abort".split()))
        if what == "offer" and p.pool.room() >= 4:
            length = data.draw(st.integers(1, 16))
            branch = data.draw(st.integers(0, 1))
            offer = p.offer([branch, *range(1, length)], now=now)
            ids.append(offer.transfer_id)
            fly(d, [offer])
        elif what == "tick":
            now += data.draw(st.sampled_from([1.0, 6.0]))
            fly(d, [send.message for send in p.sender.expire(now)])
            fly(p, [send.message for send in d.receiver.expire(now)])
        elif what == "abort" and ids:
            victim = data.draw(st.sampled_from(ids))
            if data.draw(st.booleans()):
                fly(d, [send.message for send in p.sender.abort(victim)])
            else:
                fly(p, [send.message for send in d.receiver.abort(victim)])
        elif what == "late" and everything:
            air.append(data.draw(st.sampled_from(everything)))
        elif air:
            position = data.draw(st.integers(0, len(air) - 1))
            side, message = air[position]
            if what != "double":
                air.pop(position)
            if what != "drop":
                known = side is p and p.sender.has(message.transfer_id)
                fly(p if side is d else d, side.handle(message, now, piece=data.draw(st.integers(1, 3))))
                if known and not p.sender.has(message.transfer_id):
                    ended_at_p[message.transfer_id] = type(message).__name__
        for side in (p, d):
            side.pool.check()
    for transfer_id, how in ended_at_p.items():  # the two sides agree whenever the source got an answer
        assert (how == "Done") == (transfer_id in d.claimed), f"{transfer_id}: {how}, {list(d.claimed)}"
    for _ in range(2):
        now += 2 * TIMEOUT_S
        p.sender.expire(now)
        d.receiver.expire(now)
    p.check_quiet()
    d.check_quiet()


def test_a_doubled_piece_is_written_once():
    p, d = sides()
    [accept] = d.handle(p.offer([*range(12)]), 0.0)
    first, second, _ = p.handle(accept, 0.0, piece=1)
    assert d.handle(first, 0.0) == d.handle(first, 0.0) == d.handle(second, 0.0) == []
    assert d.receiver.dropped == 1
    wide = dataclasses.replace(second, start=1, stop=3)
    assert d.receiver.on(wide, 0.0) == [] and d.receiver.dropped == 2
