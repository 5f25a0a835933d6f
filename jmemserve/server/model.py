"""The served model as the front-end sees it: names, limits, tokenizer. Turns what a client sent into a prompt. Pure."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jmemserve.errors import InvalidRequest, UnknownRequest
from jmemserve.server.text import Text, eos_ids
from jmemserve.types import SamplingParams

NO_TOKENIZER = "this model has no tokenizer; send token_ids"


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """What requests are checked against before the engine sees them."""

    name: str
    vocab_size: int
    max_model_len: int  # tokens, prompt and output together
    eos_ids: frozenset[int]
    text: Text | None  # None: the model folder has no tokenizer; only token ids can be served

    def need_text(self) -> Text:
        """The tokenizer; raises InvalidRequest if there is none."""
        if self.text is None:
            raise InvalidRequest(NO_TOKENIZER)
        return self.text

    def check_name(self, name: str) -> None:
        """Raise UnknownRequest unless ``name`` is empty or the served name."""
        if name not in ("", self.name):
            raise UnknownRequest(f"model {name!r} is not served here; this server has {self.name!r}")

    def encode_text(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The ids of a text."""
        return self._fitting(text).encode(text, add_special_tokens)

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, arguments: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """The ids of a conversation, by the model's chat template."""
        rendered = self.need_text().render_chat(messages, add_generation_prompt, arguments)
        return self._fitting(rendered).encode(rendered, add_special_tokens=False)

    def _fitting(self, text: str) -> Text:
        """The tokenizer; raises InvalidRequest for a text that is too long whatever its tokens are, without work."""
        tokenizer = self.need_text()
        most = self.max_model_len - 1
        if len(text) > most * tokenizer.longest_token:
            raise InvalidRequest(
                f"the text has {len(text)} characters, but at most {most} tokens of up to "
                f"{tokenizer.longest_token} characters fit; shorten it"
            )
        return tokenizer

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise InvalidRequest if one of ``tokens`` is outside the vocabulary."""
        if tokens and not 0 <= (low := min(tokens)) <= (high := max(tokens)) < self.vocab_size:
            wrong = low if low < 0 else high
            raise InvalidRequest(f"token id {wrong} is out of range; this model's ids are 0 to {self.vocab_size - 1}")

    def check_prompt(self, tokens: Sequence[int]) -> None:
        """Raise InvalidRequest if the model cannot continue ``tokens``."""
        if not tokens:
            raise InvalidRequest("the prompt is empty; send at least one token")
        if len(tokens) >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(tokens)} tokens, but at most {self.max_model_len - 1} fit: "
                f"this model takes {self.max_model_len} tokens, prompt and output together"
            )
        self.check_tokens(tokens)

    def check_params(self, params: SamplingParams) -> None:
        """Raise InvalidRequest if this model cannot honour ``params``."""
        params.check()
        self.check_tokens(params.stop_token_ids)
        if params.stop and self.text is None:
            raise InvalidRequest("this model has no tokenizer, so stop strings cannot be found; use stop_token_ids")

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end an output."""
        own = frozenset() if params.ignore_eos else self.eos_ids
        return own | frozenset(params.stop_token_ids)


def load_model(name: str, vocab_size: int, max_model_len: int, folder: Path, text: Text | None) -> Model:
    """The model served from ``folder``. Raises ConfigError if its files say something else than token ids."""
    # A tokenizer may know tokens that the weights do not; the model can never make them.
    eos = frozenset(token for token in eos_ids(folder, text) if token < vocab_size)
    return Model(name, vocab_size, max_model_len, eos, text)
