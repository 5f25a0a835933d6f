"""The tokenizer and the chat template of a model folder.

Files read: tokenizer.json (which says, with its post-processor, whether a text begins with a begin-of-sequence token),
tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json, chat_template.jinja.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
import tokenizers

from jmemserve.errors import ConfigError, InvalidRequest


class Text:
    """Text to tokens and back, for one model. Thread-safe."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: Mapping[str, str], template: str | None):
        """``special`` maps names such as ``bos_token`` to their text, for the chat template ``template``."""
        self._tokenizer = tokenizer
        self._special = dict(special)
        self.longest_token = max((len(token) for token in tokenizer.get_vocab()), default=1)  # in characters
        self._template = None if template is None else _compile_template(template)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The ids of ``text``; by default with what the tokenizer's post-processor adds."""
        # A batch of one: unlike a single text, it leaves Python to other threads while it works.
        return tuple(self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; ids that the tokenizer does not know have none."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation; encode it without special tokens, the template has written them.

        ``messages`` have the keys role and content. Raises InvalidRequest if the template refuses them.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template; send text or token_ids instead of messages")
        if not messages:
            raise InvalidRequest("messages is empty; send at least one message")
        variables: dict[str, Any] = {**self._special, "tools": None, "documents": None, **(arguments or {})}
        variables |= {"messages": [dict(message) for message in messages]}
        variables |= {"add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(**variables)
        except Exception as error:  # a template is a program; what it raises is about its input
            raise InvalidRequest(f"the chat template refused these messages: {error}") from error


def load_text(folder: Path) -> Text | None:
    """The tokenizer and chat template in ``folder``, or None if it has no tokenizer.json.

    Raises ConfigError if a file is there and cannot be used.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{path} is not a usable tokenizer: {error}") from error
    # Neither is a property of the model: a prompt is never cut or filled up silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _read_json(folder / "tokenizer_config.json")
    special = {}
    for source in (_read_json(folder / "special_tokens_map.json"), config):
        for name, value in source.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                special[name] = text
    return Text(tokenizer, special, _read_template(folder, config))


def eos_ids(folder: Path, text: Text | None) -> frozenset[int]:
    """The tokens that end a sequence: the union of what all files of the checkpoint say.

    Raises ConfigError if a file says something that is no token id.
    """
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        for item in values:
            if not isinstance(item, int) or isinstance(item, bool) or item < 0:
                raise ConfigError(f"{folder / name}: eos_token_id must be a token id or a list of them, not {value!r}")
            ids.add(item)
    eos = _read_json(folder / "tokenizer_config.json").get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if text is not None and isinstance(eos, str) and (token := text.token_id(eos)) is not None:
        ids.add(token)
    return frozenset(ids)


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, or in tokenizer_config.json (alone, or a list of named ones)."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"{folder / 'tokenizer_config.json'}: chat_template must be a text or a list of named ones")
    return template


def _compile_template(source: str) -> jinja2.Template:
    """A template with the helpers that Hugging Face gives it, unable to touch anything but its variables."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the model's chat template is not a usable jinja2 template: {error}") from error


def _tojson(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes for HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value
