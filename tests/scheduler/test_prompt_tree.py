"""The prompt tree: what it believes, when it stops to, and that it stays small."""

import hypothesis.strategies as st
from hypothesis import given, settings

from jmemserve.scheduler.prompt_tree import PromptTree

C = 4


def make(max_blocks=100, ttl_s=10.0):
    return PromptTree(C, max_blocks, ttl_s)


def test_match_is_per_instance_in_whole_blocks_and_never_the_last_token():
    tree = make()
    tree.insert([*range(10)], "a", 0.0)
    tree.insert([*range(4), 50, 51, 52, 53], "b", 0.0)
    assert tree.match([*range(20)], 1.0) == {"a": 8, "b": 4}
    assert tree.match([*range(8)], 1.0) == {"a": 4, "b": 4}
    assert tree.match([*range(3)], 1.0) == tree.match([], 1.0) == {}
    tree.check()


def test_salts_do_not_share():
    tree = make()
    tree.insert([*range(4)], "a", 0.0, "x")
    assert tree.match([*range(5)], 0.0) == {} and tree.match([*range(5)], 0.0, "x") == {"a": 4}


def test_beliefs_end_and_are_renewed():
    tree = make(ttl_s=10.0)
    tree.insert([*range(8)], "a", 0.0)
    tree.insert([*range(8)], "b", 6.0)
    tree.insert([*range(4)], "a", 6.0)
    assert tree.match([*range(9)], 9.0) == {"a": 8, "b": 8}
    assert tree.match([*range(9)], 10.0) == {"a": 4, "b": 8}
    assert tree.match([*range(9)], 16.0) == {} and len(tree) == 0
    tree.check()


def test_the_oldest_leave_when_it_is_full():
    tree = make(max_blocks=4)
    tree.insert([*range(8)], "a", 0.0)
    tree.insert([*range(100, 108)], "a", 1.0)
    tree.insert([*range(4)], "a", 2.0)
    tree.insert([*range(200, 204)], "a", 3.0)
    assert tree.match([*range(9)], 3.0) == {"a": 4}  # the tail was the oldest
    assert tree.match([*range(100, 109)], 3.0) == {"a": 8}
    tree.insert([*range(300, 400)], "b", 4.0)  # longer than the tree may be
    assert len(tree) == 4 and tree.match([*range(300, 400)], 4.0) == {"b": 16}
    tree.check()


def test_a_removed_instance_leaves_no_node():
    tree = make()
    tree.insert([*range(12)], "a", 0.0)
    tree.insert([*range(4)], "b", 0.0)
    tree.remove_instance("a")
    assert tree.match([*range(13)], 0.0) == {"b": 4} and len(tree) == 1
    tree.remove_instance("b")
    tree.remove_instance("b")
    assert len(tree) == 0
    tree.check()
    tree.insert([*range(4)], "a", 0.0)
    tree.clear()
    assert tree.match([*range(5)], 0.0) == {}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_agrees_with_a_list_of_what_was_inserted(data):
    tree, told, now = make(max_blocks=1000, ttl_s=5.0), [], 0.0
    for _ in range(data.draw(st.integers(1, 30))):
        tokens = data.draw(st.lists(st.integers(0, 1), max_size=14))
        what = data.draw(st.sampled_from(["insert", "insert", "match", "wait", "remove"]))
        instance = data.draw(st.sampled_from("abc"))
        if what == "insert":
            tree.insert(tokens, instance, now)
            told.append((tokens, instance, now))
        elif what == "wait":
            now += data.draw(st.sampled_from([0.5, 2.0]))
        elif what == "remove":
            tree.remove_instance(instance)
            told = [entry for entry in told if entry[1] != instance]
        else:
            expected = {}
            for known, name, time in told:
                common = 0
                while (common + 1) * C <= min(len(known), len(tokens) - 1) and (
                    known[common * C : (common + 1) * C] == tokens[common * C : (common + 1) * C]
                ):
                    common += 1
                if common and now - time < 5.0:
                    expected[name] = max(expected.get(name, 0), common * C)
            assert tree.match(tokens, now) == expected
        tree.check()
