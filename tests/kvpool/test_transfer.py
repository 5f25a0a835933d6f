"""The transfer machines: the orderly way, every disorderly one, and the field's lessons that apply."""

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from transfer_world import TIMEOUT_S, C, Side, kinds, run, sides

from jmemserve.errors import StaleAddress
from jmemserve.kvpool import Medium
from jmemserve.kvpool import transfer as tx


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


@pytest.mark.parametrize(
    "change",
    [
        {"num_blocks": 3},  # fewer than the tokens fill
        {"num_blocks": -1, "tokens": None},
        {"num_blocks": 1 << 60},
        {"parts": 0},
        {"parts": -1},
        {"parts": 1 << 40},
        {"tokens": (1 << 31,) * 18},
        {"tokens": (0,) * 17 + (-(1 << 40),)},
    ],
    ids=str,
)
def test_an_offer_with_odd_numbers_is_refused_and_changes_nothing(change):
    p, d = sides()
    [answer] = d.handle(dataclasses.replace(p.offer([*range(18)]), **change), 0.0)
    assert isinstance(answer, tx.Refuse)
    p.handle(answer, 0.0)
    p.check_quiet()
    d.check_quiet()


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


def test_answers_that_do_not_fit_are_dropped():
    p, d = sides()
    offer = p.offer([*range(12)], private=None)
    [accept] = d.handle(offer, 0.0)
    wrong = [
        tx.Done(offer.transfer_id),  # of what was not even accepted
        tx.Landed(offer.transfer_id, 0, tx.WHOLE),
        dataclasses.replace(accept, epoch=2),
        dataclasses.replace(accept, have=-1),
        dataclasses.replace(accept, have=4),
        dataclasses.replace(accept, addresses=accept.addresses[:2]),
        offer,
    ]
    assert [p.sender.on(message, 0.0) for message in wrong] == [[]] * 7 and p.sender.dropped == 7
    for message in p.handle(accept, 0.0):
        d.handle(message, 0.0)
    for message in (accept, tx.Done(offer.transfer_id)):  # twice, and before Close
        assert p.handle(message, 0.0) == []
    assert p.sender.dropped == 9 and p.sender.has(offer.transfer_id)
    [close] = p.do(p.sender.close(offer.transfer_id, b"", 0.0), 0.0)
    for answer in d.handle(close, 0.0):
        p.handle(answer, 0.0)
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


@pytest.mark.parametrize(
    "change",
    [
        {"start": 0},  # is cached there
        {"start": -1, "stop": 1},
        {"stop": 4},
        {"start": 2, "stop": 1},
        {"start": 2, "stop": 2},
        {"epoch": 2},
        {"part": 0},  # all layers come together
        {"part": 1},
        {"part": -2},
    ],
    ids=str,
)
def test_data_with_wrong_numbers_is_dropped(change):
    p, d = sides()
    run(p, d, p.offer([*range(4)]))
    [accept] = d.handle(p.offer([*range(12)]), 0.0)  # has 1, lacks 1 and 2
    data, close = p.handle(accept, 0.0)
    assert (data.start, data.stop, data.part) == (1, 3, tx.WHOLE)
    assert d.receiver.on(dataclasses.replace(data, **change), 0.0) == [] and d.receiver.dropped == 1
    assert kinds([*d.handle(data, 0.0), *d.handle(close, 0.0)]) == ["Landed", "Done"]


@pytest.mark.parametrize("part", [tx.WHOLE, 2, -2])
def test_data_of_a_part_that_was_not_offered_is_dropped(part):
    p, d = sides()
    [accept] = d.handle(p.offer([*range(8)], parts=2), 0.0)
    keys, values, close = p.handle(accept, 0.0)
    assert d.receiver.on(dataclasses.replace(keys, part=part), 0.0) == [] and d.receiver.dropped == 1
    for message in (keys, values, close):
        d.handle(message, 0.0)
    assert len(d.claimed) == 1


def test_a_close_before_its_data_is_dropped():
    p, d = sides()
    [accept] = d.handle(p.offer([*range(12)]), 0.0)
    first, second, close = p.handle(accept, 0.0)
    d.handle(first, 0.0)
    assert d.handle(close, 0.0) == [] and d.receiver.dropped == 1
    other = dataclasses.replace(close, epoch=2)
    d.handle(second, 0.0)
    assert d.handle(other, 0.0) == [] and d.receiver.dropped == 2
    [done] = d.handle(close, 0.0)
    p.handle(done, 0.0)
    p.check_quiet()
    d.check_quiet()


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
    assert [d.get(address) for address in theirs] == [[tuple(range(n))] * 2 for n in (4, 8, 12)]
    assert d.pool.owned() == {"p": 3}  # they stay the source's
    assert p.sender.ended[-1][3] is False
    d.pool.free_owned_by("p")
    p.check_quiet()
    d.check_quiet()


@pytest.mark.parametrize(
    "how", ["another's", "nobody's", "stale", "twice", "one more, twice", "too few", "of another instance"]
)
def test_wrong_destinations_are_refused_and_change_nothing(how):
    p, d = sides()
    owner = "q" if how == "another's" else "p"
    theirs = d.pool.alloc_mem(3, owner=None if how == "nobody's" else owner)
    if how == "stale":
        d.pool.free_mem(theirs, owner="p")
    targets = {
        "twice": (theirs[0], theirs[0], theirs[1]),
        "one more, twice": (*theirs, theirs[0]),
        "too few": tuple(theirs[:2]),
        "of another instance": tuple(address._replace(instance="e") for address in theirs),
    }.get(how, tuple(theirs))
    before = repr(d.pool)
    log = run(p, d, p.offer([*range(12)], targets=targets))
    assert kinds(log) == ["Offer", "Refuse"] and repr(d.pool) == before
    d.check()
    p.check_quiet()


@pytest.mark.parametrize("insert", [True, False])
def test_blocks_that_can_be_found_are_no_destination(insert):
    """Whoever found them would read somebody else's bytes."""
    p, d = sides()
    theirs = d.pool.alloc_mem(1, owner="p")
    run(p, d, p.offer([90, 91, 92, 93], flags=tx.Flags.NONE, targets=tuple(theirs)))
    assert d.pool.peek([90, 91, 92, 93, 0]) == 4 and d.pool.owned() == {"p": 1}
    log = run(p, d, p.offer([*range(4)], targets=tuple(theirs), insert=insert))
    assert kinds(log) == ["Offer", "Refuse"] and "in the index" in log[1].reason
    d.check()
    d.pool.free_owned_by("p")
    p.check_quiet()
    d.check_quiet()


def test_lesson_1_a_destination_with_a_write_under_way_is_refused():
    p, d = sides()
    theirs = tuple(d.pool.alloc_mem(1, owner="p"))
    d.slow = True
    first = p.offer([*range(4)], targets=theirs)
    [accept] = d.handle(first, 0.0)
    d.handle(p.handle(accept, 0.0)[0], 0.0)
    assert kinds(d.handle(p.offer([*range(50, 54)], targets=theirs), 0.0)) == ["Refuse"]
    d.receiver.abort(first.transfer_id)
    assert kinds(d.handle(p.offer([*range(50, 54)], targets=theirs), 0.0)) == ["Refuse"]  # it is still being written
    d.land(d.writing.pop(), 0.0)
    d.slow = False
    [accept] = d.handle(p.offer([*range(50, 54)], targets=theirs), 0.0)
    for message in p.handle(accept, 0.0):
        d.handle(message, 0.0)
    assert d.get(theirs[0]) == [(50, 51, 52, 53)] * 2
    d.pool.free_mem(theirs, owner="p")
    p.sender.expire(1e9)
    p.sender.expire(2e9)
    p.check_quiet()
    d.check_quiet()


def test_a_destination_given_back_meanwhile_stays_out_of_other_hands():
    p, d = sides(num_blocks=1)
    theirs = tuple(d.pool.alloc_mem(1, owner="p"))
    [accept] = d.handle(p.offer([*range(4)], targets=theirs), 0.0)
    d.handle(tx.Free("p", 1, theirs), 0.0)
    assert d.pool.owned() == {} and d.pool.room() == 0
    for message in p.handle(accept, 0.0):
        for answer in d.handle(message, 0.0):
            p.handle(answer, 0.0)
    assert d.pool.peek([*range(5)]) == 4
    p.check_quiet()
    d.check_quiet()


def test_claimed_destinations_are_shared_by_owner_and_source():
    p, d = sides()
    theirs = tuple(d.pool.alloc_mem(2, owner="p"))
    run(p, d, p.offer([*range(8)], targets=theirs))
    assert list(d.claimed.values()) == [[*theirs]] and d.pool.owned() == {"p": 2}
    d.pool.free_owned_by("p")
    assert d.pool.held == 2  # the claimant's
    p.check_quiet()
    d.check_quiet()


# -- whose blocks are ------------------------------------------------------------------------------------------------


def test_what_is_only_transferred_is_the_sources_by_name_but_not_before_it_is_done():
    p, d = sides()
    [accept] = d.handle(p.offer([*range(8)], flags=tx.Flags.NONE, insert=False), 0.0)
    data, close = p.handle(accept, 0.0)
    d.handle(data, 0.0)
    assert d.pool.owned() == {}
    with pytest.raises(StaleAddress):
        d.pool.free_mem(accept.addresses, owner="p")
    [done] = d.handle(close, 0.0)
    p.handle(done, 0.0)
    [(_, error, targets, ours)] = p.sender.ended
    assert (error, targets, ours) == (None, accept.addresses, True)
    assert d.pool.owned() == {"p": 2} and d.pool.peek([*range(9)]) == 0
    assert d.pool.free_owned_by("p") == 2 and d.pool.free == 16
    p.check_quiet()
    d.check_quiet()


@pytest.mark.parametrize("done_there", [True, False])
@pytest.mark.parametrize("how", ["abort", "deadlines"])
def test_a_source_that_gives_up_after_close_gives_back_what_may_be_its_own_by_now(how, done_there):
    """Nobody else would: to the destination they are an allocation of a living peer."""
    p, d = sides()
    offer = p.offer([*range(8)], flags=tx.Flags.NONE, insert=False)
    [accept] = d.handle(offer, 0.0)
    sent = p.handle(accept, 0.0)
    if done_there:
        for message in sent:
            d.handle(message, 0.0)  # the answers are lost
        assert d.pool.owned() == {"p": 2}
    if how == "abort":
        sends = p.sender.abort(offer.transfer_id)
    else:
        sends = [*p.sender.expire(TIMEOUT_S), *p.sender.expire(2 * TIMEOUT_S)]
    assert kinds([send.message for send in sends]) == ["Cancel", "Free"]
    for send in sends:
        for answer in d.handle(send.message, 20.0):
            p.handle(answer, 20.0)
    assert len(p.sender.ended) == 1 and p.sender.ended[0][1] is not None
    p.check_quiet()
    d.check_quiet()


@pytest.mark.parametrize("kwargs", [{}, {"flags": tx.Flags.NONE}], ids=["claimed", "cached"])
def test_a_source_that_gives_up_frees_nothing_that_is_not_its_own(kwargs):
    p, d = sides()
    offer = p.offer([*range(8)], **kwargs)
    [accept] = d.handle(offer, 0.0)
    p.handle(accept, 0.0)
    assert kinds([send.message for send in p.sender.abort(offer.transfer_id)]) == ["Cancel"]


@pytest.mark.parametrize("flags, count", [(tx.Flags.DRAM, 3), (tx.Flags.MIXED, 4), (tx.Flags.NONE, 3)], ids=str)
def test_a_medium_that_is_full_refuses(flags, count):
    p, d = sides(num_blocks=2, dram_blocks=2)
    if flags & tx.Flags.MIXED:
        d.pool.alloc_mem(1, Medium.DRAM, owner="x")
    log = run(p, d, p.offer([*range(count * C)], flags=flags))
    assert kinds(log) == ["Offer", "Refuse"] and f"{count} blocks needed" in log[1].reason
    log = run(p, d, p.offer([*range((count - 1) * C)], flags=flags | tx.Flags.CLAIM))
    assert kinds(log)[-1] == "Done" and d.pool.room(flags.medium) == 0
    d.pool.free_owned_by("x")
    p.check_quiet()
    d.check_quiet()


def test_what_the_quota_of_the_destination_leaves_out_is_free_again():
    p, d = sides(quota=(2, None))
    log = run(p, d, p.offer([*range(16)], flags=tx.Flags.NONE))
    assert kinds(log)[-1] == "Done" and d.pool.peek([*range(17)]) == 8
    assert (d.pool.held, d.pool.cached, d.pool.free) == (0, 2, 14)
    run(p, d, p.offer([*range(50, 62)]))  # a claim holds all of them nonetheless
    assert d.pool.held == 3 and d.pool.peek([*range(50, 63)]) == 8
    p.check_quiet()
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
    foreign = dataclasses.replace(others, transfer_id="q.1.0", source="q")
    d.handle(mine, 0.0)
    d.handle(foreign, 0.0)
    ids = (mine.transfer_id, others.transfer_id, foreign.transfer_id, "?")
    p.sender.renew(ids, "d", 8.0)
    d.receiver.renew(ids, "p", 8.0)
    assert [send.message.transfer_id for send in p.sender.expire(TIMEOUT_S)] == [others.transfer_id]
    assert [send.message.transfer_id for send in d.receiver.expire(TIMEOUT_S)] == [foreign.transfer_id]
    assert p.sender.by_peer() == {"d": [mine.transfer_id]} and d.receiver.by_peer() == {"p": [mine.transfer_id]}
    assert len(p.sender.expire(18.0)) == len(d.receiver.expire(18.0)) == 1
    p.check_quiet()
    d.check_quiet()


@pytest.mark.parametrize("lost", ["Accept", "Data", "Landed", "Close"])
def test_two_sides_that_wait_for_each_other_do_not_keep_a_transfer_alive(lost):
    p, d = sides()
    air: list[tuple] = [(d, p.offer([*range(12)], now=0.0))]
    while air:
        side, message = air.pop(0)
        if type(message).__name__ != lost:
            air += [(p if side is d else d, answer) for answer in side.handle(message, 0.0)]
    waits = len(p.sender), len(d.receiver)
    for now in range(1, int(3 * TIMEOUT_S)):
        d.receiver.renew(tuple(p.sender.at_work(now).get("d", ())), "p", now)
        p.sender.renew(tuple(d.receiver.at_work(now).get("p", ())), "d", now)
        for send in p.sender.expire(now):
            d.handle(send.message, now)
        for send in d.receiver.expire(now):
            p.handle(send.message, now)
    assert waits != (0, 0) or lost == "Landed"
    p.check_quiet()
    d.check_quiet()


def test_who_is_at_work_keeps_a_transfer_alive():
    p, d = sides()
    d.slow = True
    offer = p.offer([*range(12)], ready=1, private=None)
    [data] = p.handle(d.handle(offer, 0.0)[0], 0.0)
    d.handle(data, 0.0)
    assert p.sender.at_work(1.0) == {}  # the destination writes
    assert d.receiver.at_work(1.0) == {"p": [offer.transfer_id]}
    assert p.handle(d.land(d.writing.pop(), 1.0)[0], 1.0) == []
    assert d.receiver.at_work(2.0) == {}
    assert p.sender.at_work(2.0) == {"d": [offer.transfer_id]}  # the other blocks are being computed
    assert p.sender.expire(1.0 + TIMEOUT_S) == [] and p.sender.has(offer.transfer_id)
    p.sender.abort(offer.transfer_id)
    d.receiver.abort(offer.transfer_id)
    p.check_quiet()
    d.check_quiet()


# -- a peer that is gone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["offered", "accepted", "shipping", "sent", "asked"])
def test_a_destination_that_is_gone_ends_every_state_of_its_source(state):
    p, d = sides()
    offer = p.offer([*range(12)], **({"private": None} if state == "shipping" else {}))
    other = p.offer([*range(50, 54)], to="e")
    late = d.handle(offer, 0.0)
    if state not in ("offered", "accepted"):
        late += [tx.Done(offer.transfer_id), tx.Landed(offer.transfer_id, 0, tx.WHOLE)]
        p.handle(late[0], 0.0)
    if state == "asked":
        asks = [send.message.transfer_id for send in p.sender.expire(TIMEOUT_S)]
        assert asks == [offer.transfer_id, other.transfer_id] and len(p.sender) == 1
    assert p.sender.drop_peer("d") == [offer.transfer_id] and p.sender.drop_peer("d") == []
    assert p.sender.ended[-1][:2] == (offer.transfer_id, "d is gone")
    assert p.sender.has(other.transfer_id) == (state != "asked")
    for message in late:
        assert p.handle(message, 0.0) == []
    assert p.sender.dropped == len(late)
    p.sender.drop_peer("e")
    p.check_quiet()


@pytest.mark.parametrize("state", ["accepted", "writing", "part landed", "all landed", "closed", "over", "done"])
def test_a_source_that_is_gone_ends_every_state_of_its_destination(state):
    p, d = sides()
    offer = p.offer([*range(12)])
    [accept] = d.handle(offer, 0.0)
    first, second, close = p.handle(accept, 0.0)
    d.slow = state in ("writing", "closed", "over")
    reached = {"accepted": [], "writing": [first, second], "part landed": [first], "all landed": [first, second]}
    for message in reached.get(state, [first, second, close]):
        d.handle(message, 0.0)
    if state == "over":
        d.receiver.abort(offer.transfer_id)
    alive = state not in ("over", "done")
    assert d.receiver.drop_peer("q") == []
    assert d.receiver.drop_peer("p") == [offer.transfer_id] * alive
    assert d.receiver.drop_peer("p") == []
    assert d.pool.held == (3 if d.writing or state == "done" else 0)
    for land in d.writing:
        assert d.pool.held == 3  # until the last write is over
        assert d.land(land, 0.0) == []
    for message in (offer, first, second, close):
        assert d.handle(message, 0.0) == []
    assert bool(d.claimed) == (state == "done") and d.pool.peek([*range(13)]) == (12 if state == "done" else 0)
    p.sender.drop_peer("d")
    p.check_quiet()
    d.check_quiet()
