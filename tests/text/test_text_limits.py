"""A text that cannot fit is refused without the work of tokenising it."""

import time

import pytest

from jmemserve.config import demo_folder
from jmemserve.errors import ConfigError, InvalidRequest
from jmemserve.server.model import load_model
from jmemserve.server.text import load_text


def test_a_text_that_cannot_fit_is_refused_at_once() -> None:
    text = load_text(demo_folder())
    assert text is not None and text.longest_token > 4
    model = load_model("demo", 1024, 128, demo_folder(), text)
    start = time.monotonic()
    with pytest.raises(InvalidRequest, match="shorten it"):
        model.encode_text("abc def " * 2_000_000)
    with pytest.raises(InvalidRequest, match="shorten it"):
        model.encode_chat([{"role": "user", "content": "abc def " * 100_000}], True, {})
    assert time.monotonic() - start < 5
    assert model.encode_text("ROMEO:") == text.encode("ROMEO:")


def test_a_chat_template_that_is_no_text_is_refused(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((demo_folder() / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_text(tmp_path)
