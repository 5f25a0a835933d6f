"""The text files of a model folder: what is read, what is refused."""

import json
import sys
from pathlib import Path

import pytest

from jmemserve.errors import ConfigError, InvalidRequest
from jmemserve.server.model import load_model
from jmemserve.server.text import Text, eos_ids, load_text

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
import small_text  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_text.write_folder(tmp_path)


def need_text(folder: Path) -> Text:
    text = load_text(folder)
    assert text is not None
    return text


def test_round_trip_and_bos(folder: Path) -> None:
    text = need_text(folder)
    bos = text.token_id(small_text.BOS)
    tokens = text.encode("the café")
    assert tokens[0] == bos and text.decode(tokens) == "the café"
    assert text.encode("the café", add_special_tokens=False) == tokens[1:]
    assert text.decode(tokens, skip_special_tokens=False) == small_text.BOS + "the café"


def test_eos_is_the_union(folder: Path) -> None:
    text = need_text(folder)
    assert eos_ids(folder, text) == {7, 8, 9, text.token_id(small_text.EOS)}
    assert eos_ids(folder, None) == {7, 8, 9}


def test_eos_outside_the_vocabulary_is_dropped(folder: Path) -> None:
    assert load_model("m", 9, 100, folder, None).eos_ids == {7, 8}


@pytest.mark.parametrize("value", ["7", [1, "x"], -1, True])
def test_eos_that_is_no_id(folder: Path, value: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError, match="eos_token_id must be"):
        eos_ids(folder, None)


def test_no_tokenizer(tmp_path: Path) -> None:
    assert load_text(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "Nothing"}}'])
def test_broken_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match="not a usable tokenizer"):
        load_text(tmp_path)


def test_broken_tokenizer_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="JSON object"):
        load_text(folder)


def test_chat(folder: Path) -> None:
    text = need_text(folder)
    messages = [{"role": "system", "content": "Be <brief> & kind."}, {"role": "user", "content": "Hi"}]
    expected = f"{small_text.BOS}<system>Be <brief> & kind.\n<user>Hi\n"
    assert text.render_chat(messages) == expected + "<assistant>"
    assert text.render_chat(messages, add_generation_prompt=False) == expected
    assert text.render_chat(messages, arguments={"think": True}) == expected + "<think><assistant>"


def test_chat_template_of_its_own_file_wins(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content | tojson }} {{ strftime_now('%%') }}")
    assert need_text(folder).render_chat([{"role": "user", "content": "<é>"}]) == '"<é>" %'


def test_named_chat_templates(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ eos_token }}"}]
    config = {"eos_token": "E", "chat_template": named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert need_text(folder).render_chat([{"role": "user", "content": ""}]) == "E"


def test_chat_template_refuses(folder: Path) -> None:
    text = need_text(folder)
    with pytest.raises(InvalidRequest, match="unknown role robot"):
        text.render_chat([{"role": "robot", "content": "Hi"}])
    with pytest.raises(InvalidRequest, match="at least one message"):
        text.render_chat([])


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for i in range(10**9) %}{% endfor %}"]
)
def test_chat_template_is_in_a_sandbox(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InvalidRequest, match="refused"):
        need_text(folder).render_chat([{"role": "user", "content": "Hi"}])


def test_broken_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match="chat template"):
        load_text(folder)


def test_no_chat_template(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="no chat template"):
        need_text(folder).render_chat([{"role": "user", "content": "Hi"}])
