"""Small tokenizers, made here: byte-level as Llama 3 and Qwen have, and with byte fallback as Llama 2 has."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = "the cat sat on the mat and the café was open, naïve über 日本語 text 😀 end of the story. " * 4
EOS, BOS = "<|end|>", "<|begin|>"
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if think %}<think>{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level() -> tokenizers.Tokenizer:
    """Every byte is a token, some words too; begins a text with BOS."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=None, special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """Words begin with a marked space; what has no token is written in bytes; the first space of a text is dropped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz.,", "▁the", "▁cat", "▁sat", "on", "▁on", "é"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁o", "n")] if "▁o" in vocab else []
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def write_folder(folder: Path) -> Path:
    """A model folder's text files, with the end-of-sequence tokens spread over them as checkpoints do."""
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    config = {"eos_token": {"content": EOS}, "bos_token": BOS, "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
