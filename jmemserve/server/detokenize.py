"""Tokens to text while they are made: characters that span tokens, and stop strings that span deltas. Pure.

    tokens of the output    |..........|prefix....|read......|
                              emitted     emitted    held: may be part of a character

``prefix`` exists because a token's text depends on what stands before it (a leading space, for one): new text is
decode(prefix:) less decode(prefix:read), never decode(read:).
"""

from collections.abc import Callable, Sequence

from jmemserve.errors import InvalidRequest

MAX_STOP_LENGTH = 512  # characters: bounds the text that is held back, and the work per token
_REPLACEMENT = "\ufffd"  # what an incomplete character decodes to
_LONGEST_CHARACTER = 4  # tokens: a UTF-8 character has at most four bytes, and a token at least one
_CONTEXT = 10  # tokens of the prompt to look at: parts of two characters, and a whole one between them
_HELD = 8  # tokens held before we look for those that can no longer become part of a character


class Detokenizer:
    """The text of one output, token by token, in amortised constant time per token.

    What is returned joins to the decoding of all tokens together, unless they decode to bytes that are no UTF-8 and
    the tokenizer replaces such bytes run by run.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]):
        self._decode = decode
        self._window = _context(decode, prompt)  # tokens from ``prefix`` on
        self._read = len(self._window)
        # A prompt may end inside a character; the token that completes it yields the whole character.
        self._before = decode(self._window).rstrip(_REPLACEMENT) if self._window else ""

    def push(self, *tokens: int) -> str:
        """The text that is certain now that ``tokens`` follow. All at once cost little more than one."""
        self._window += tokens
        after = self._decode(self._window)
        if not after.endswith(_REPLACEMENT):
            if len(after) <= len(self._before):
                # A special token, or one that is only seen with the next. Many of them in a row are not kept for ever.
                return self._emit(len(self._window)) if len(self._window) - self._read > _HELD else ""
            return self._emit(len(self._window))
        if len(self._window) - self._read <= _HELD:
            return ""
        return self._emit(self._boundary(after))

    def flush(self) -> str:
        """The rest, when nothing follows."""
        return self._emit(len(self._window))

    def _boundary(self, after: str) -> int:
        """Where to split the held tokens so that the last character, if incomplete, stays whole.

        Splitting inside a character changes how many replacements the two parts decode to.
        """
        size = len(self._window)
        for cut in range(size - 1, size - 1 - _LONGEST_CHARACTER, -1):
            if self._decode(self._window[:cut]) + self._decode(self._window[cut:]) == after:
                return cut
        return size

    def _emit(self, stop: int) -> str:
        """Return the text of window[read:stop], and make these tokens the new prefix."""
        part = self._window[self._read : stop]
        if not part:
            return ""
        after = self._decode(self._window[:stop])
        text = after[len(self._before) :] if after.startswith(self._before) else self._decode(part)
        if text:  # tokens without text are no context, so the old prefix stays until there is some
            del self._window[: self._read]
            self._before = self._decode(self._window[: len(part)])
            self._read = len(part)
        else:
            del self._window[self._read : stop]
        return text


class StopMatcher:
    """Finds the first stop string to be completed in a text that arrives in pieces.

    The result does not depend on how the text is cut into pieces: of all occurrences the one that ends first counts,
    and of those with one end the longest.
    """

    def __init__(self, stops: Sequence[str], keep_match: bool):
        for stop in stops:
            if len(stop) > MAX_STOP_LENGTH:
                raise InvalidRequest(f"a stop string may have {MAX_STOP_LENGTH} characters, not {len(stop)}")
        self._stops, self._keep_match = tuple(stops), keep_match
        self._held = ""  # Invariant: a proper prefix of a stop string, or empty
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """The text that is certain to stay before any match; after a match, which sets ``matched``, nothing more."""
        if self.matched is not None:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._keep_match else start]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held


def _context(decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, from the start of a character on."""
    tokens = list(prompt[-_CONTEXT:])
    for start in range(min(_LONGEST_CHARACTER, len(tokens))):
        if not decode(tokens[start:]).startswith(_REPLACEMENT):
            return tokens[start:]
    return tokens


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
