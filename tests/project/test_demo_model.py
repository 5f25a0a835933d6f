"""The embedded checkpoint: its tokenizer, and that its files agree with each other."""

import json

import safetensors
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jmemserve.config import demo_folder

TOKENIZER = tokenizers.Tokenizer.from_file(str(demo_folder() / "tokenizer.json"))
CONFIG = json.loads((demo_folder() / "config.json").read_text())


@given(st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=60))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert ids[0] == CONFIG["bos_token_id"]
    assert max(ids) < CONFIG["vocab_size"]
    assert TOKENIZER.decode(ids) == text


def test_files_agree() -> None:
    assert TOKENIZER.get_vocab_size() == CONFIG["vocab_size"]
    named = json.loads((demo_folder() / "tokenizer_config.json").read_text())
    assert TOKENIZER.token_to_id(named["bos_token"]) == CONFIG["bos_token_id"]
    assert TOKENIZER.token_to_id(named["eos_token"]) == CONFIG["eos_token_id"]
    generation = json.loads((demo_folder() / "generation_config.json").read_text())
    assert generation["eos_token_id"] == CONFIG["eos_token_id"]
    with safetensors.safe_open(demo_folder() / "model.safetensors", "numpy") as weights:
        assert "lm_head.weight" not in weights.keys()  # the embeddings are tied
        assert weights.get_slice("model.embed_tokens.weight").get_shape() == [
            CONFIG["vocab_size"],
            CONFIG["hidden_size"],
        ]
        rows = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
        assert weights.get_slice("model.layers.3.self_attn.k_proj.weight").get_shape() == [rows, CONFIG["hidden_size"]]
