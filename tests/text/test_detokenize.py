"""Streamed text equals the decoding of all tokens; stop strings do not depend on how the text is cut."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmemserve.errors import InvalidRequest
from jmemserve.server.detokenize import Detokenizer, StopMatcher
from jmemserve.server.text import Text

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
import small_text  # noqa: E402

LEVEL = Text(small_text.byte_level(), {}, None)
FALLBACK = Text(small_text.byte_fallback(), {}, None)
BYTE_ONE = LEVEL.encode("a", add_special_tokens=False)[0]
_ids = st.integers(0, 319)


def stream(text: Text, tokens: list[int], prompt: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(functools.partial(text.decode, skip_special_tokens=skip), prompt)
    return [detokenizer.push(token) for token in tokens] + [detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(st.lists(_ids, max_size=60), st.booleans())
def test_any_tokens_byte_level(tokens: list[int], skip: bool) -> None:
    assert "".join(stream(LEVEL, tokens, [], skip)) == LEVEL.decode(tokens, skip)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_valid_text_after_a_prompt(prompt: str, more: str) -> None:
    both = LEVEL.encode(prompt + more, add_special_tokens=False)
    for cut in {0, len(both) // 2, len(both)}:
        before = LEVEL.decode(both[:cut])
        pieces = stream(LEVEL, list(both[cut:]), list(both[:cut]))
        assert before.rstrip("\ufffd") + "".join(pieces) == (
            prompt + more if cut < len(both) else before.rstrip("\ufffd")
        )


@settings(max_examples=100, deadline=None)
@given(st.text("abc the.é日😀 ", max_size=40))
def test_valid_text_byte_fallback(text: str) -> None:
    tokens = FALLBACK.encode(text, add_special_tokens=False)
    pieces = stream(FALLBACK, list(tokens), [])
    assert "".join(pieces) == FALLBACK.decode(tokens)


def test_space_before_a_word_after_a_prompt() -> None:
    prompt = FALLBACK.encode("the cat")
    more = [token for word in ("▁sat", "▁on") if (token := FALLBACK.token_id(word)) is not None]
    assert stream(FALLBACK, more, list(prompt)) == [" sat", " on", ""]
    assert stream(FALLBACK, more, []) == ["sat", " on", ""]


def test_characters_come_whole() -> None:
    tokens = FALLBACK.encode("日😀")
    assert [piece for piece in stream(FALLBACK, list(tokens), []) if piece] == ["日", "😀"]


def test_work_per_token_is_bounded() -> None:
    """However long the garbage, no decoding sees more than a small window."""
    longest = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return LEVEL.decode(tokens)

    lead = next(token for token in range(2, 258) if LEVEL.decode([token]) == "\ufffd")
    for garbage in ([lead] * 500, [0] * 500, [lead, 0] * 250):
        detokenizer = Detokenizer(decode, [])
        text = "".join([detokenizer.push(token) for token in garbage]) + detokenizer.flush()
        assert text == LEVEL.decode(garbage)
    assert longest <= 32


def slow_match(text: str, stops: list[str], keep: bool) -> tuple[str, str | None]:
    """The first stop string to be complete, character by character."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if keep else end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    st.booleans(),
)
def test_stop_strings_any_cut(pieces: list[str], stops: list[str], keep: bool) -> None:
    matcher = StopMatcher(stops, keep)
    got = "".join([matcher.push(piece) for piece in pieces]) + matcher.flush()
    assert (got, matcher.matched) == slow_match("".join(pieces), stops, keep)


def test_stop_string_too_long() -> None:
    with pytest.raises(InvalidRequest, match="512 characters"):
        StopMatcher(["x" * 513], False)
