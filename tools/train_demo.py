"""Train the demo checkpoint: a small Llama in Hugging Face form, with its tokenizer, from one plain text.

    python tools/train_demo.py --text tinyshakespeare.txt.gz --out jmemserve/demo

The text is tinyshakespeare (https://github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt, plain or gzipped):
40,000 lines of Shakespeare's plays, public domain. Needs jax, optax, tokenizers and safetensors; takes about half an
hour on two CPU cores. The same text, flags and library versions give the same checkpoint.

The forward pass below is batched and made for training; it is Llama as Hugging Face defines it (RMSNorm, rotary
positions by halves, grouped queries, SwiGLU, tied embeddings), so that the checkpoint needs no conversion.
"""

import argparse
import dataclasses
import functools
import gzip
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import tokenizers

BOS, EOS = "<|bos|>", "<|eos|>"
SPEECHES = (4, 24)  # how many speeches a training document has, at least and at most
CHAT_TEMPLATE = r"""{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ 'First Citizen:\n' }}
{%- elif message.role == 'assistant' %}{{ 'ROMEO:\n' }}
{%- endif %}
{{- message.content + '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ROMEO:\n' }}{% endif %}"""

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the model, in the words of config.json."""

    vocab_size: int = 1024
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 512
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


@dataclasses.dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the training with windows of one length."""

    share: float  # of all steps
    length: int  # tokens per window
    windows: int  # per step


# Mostly short windows, which are cheap; then long ones, so that every position of the context has been trained.
PHASES = (Phase(0.82, 256, 4), Phase(0.14, 1024, 1), Phase(0.04, 2048, 1))


def read_text(path: Path) -> str:
    """The text at ``path``, gunzipped if its name ends in .gz."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def train_tokenizer(text: str, vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of ``vocab_size`` entries; encoding puts BOS in front."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def encode(text: str, tokenizer: tokenizers.Tokenizer, seed: int) -> np.ndarray:
    """The token stream i32[N]: documents of a few speeches each, every one between BOS and EOS."""
    rng = random.Random(seed)
    speeches = text.strip().split("\n\n")
    documents = []
    while speeches:
        count = rng.randint(*SPEECHES)
        documents.append("\n\n".join(speeches[:count]) + "\n")
        speeches = speeches[count:]
    eos = tokenizer.token_to_id(EOS)
    return np.array([i for e in tokenizer.encode_batch(documents) for i in (*e.ids, eos)], np.int32)


def init_params(shape: Shape, seed: int) -> Params:
    """Random weights under Hugging Face's names, each matrix [out, in]."""
    rng = np.random.default_rng(seed)
    d, f = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    small = 0.02 / np.sqrt(2 * shape.num_hidden_layers)  # what is added to the residual stream starts small

    def normal(rows: int, columns: int, std: float = 0.02) -> jax.Array:
        return jnp.asarray(rng.normal(0.0, std, (rows, columns)), jnp.float32)

    params = {"model.embed_tokens.weight": normal(shape.vocab_size, d), "model.norm.weight": jnp.ones(d)}
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        params |= {
            prefix + "input_layernorm.weight": jnp.ones(d),
            prefix + "self_attn.q_proj.weight": normal(q, d),
            prefix + "self_attn.k_proj.weight": normal(kv, d),
            prefix + "self_attn.v_proj.weight": normal(kv, d),
            prefix + "self_attn.o_proj.weight": normal(d, q, small),
            prefix + "post_attention_layernorm.weight": jnp.ones(d),
            prefix + "mlp.gate_proj.weight": normal(f, d),
            prefix + "mlp.up_proj.weight": normal(f, d),
            prefix + "mlp.down_proj.weight": normal(d, f, small),
        }
    return params


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary positions on [B, T, H, D]; the halves of D are the pairs."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-np.arange(half) / half)
    angles = np.arange(x.shape[1])[:, None] * frequencies  # [T, D/2]
    cos, sin = jnp.asarray(np.cos(angles), x.dtype)[None, :, None], jnp.asarray(np.sin(angles), x.dtype)[None, :, None]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def forward(params: Params, tokens: jax.Array, shape: Shape) -> jax.Array:
    """Logits f32[B, T, V] of tokens i32[B, T]."""
    batch, length = tokens.shape
    eps = shape.rms_norm_eps
    x = params["model.embed_tokens.weight"][tokens]
    for layer in range(shape.num_hidden_layers):
        w = functools.partial(_weight, params, f"model.layers.{layer}.")
        y = rms_norm(x, w("input_layernorm"), eps)
        heads = (batch, length, -1, shape.head_dim)
        q = rotate((y @ w("self_attn.q_proj").T).reshape(heads), shape.rope_theta)
        k = rotate((y @ w("self_attn.k_proj").T).reshape(heads), shape.rope_theta)
        v = (y @ w("self_attn.v_proj").T).reshape(heads)
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + out.reshape(batch, length, -1) @ w("self_attn.o_proj").T
        y = rms_norm(x, w("post_attention_layernorm"), eps)
        x = x + (jax.nn.silu(y @ w("mlp.gate_proj").T) * (y @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
    return rms_norm(x, params["model.norm.weight"], eps) @ params["model.embed_tokens.weight"].T


def _weight(params: Params, prefix: str, name: str) -> jax.Array:
    return params[f"{prefix}{name}.weight"]


def loss_fn(params: Params, window: jax.Array, shape: Shape) -> jax.Array:
    """Mean cross-entropy in nats of predicting window[:, 1:] from what stands before; window is i32[B, T + 1]."""
    logits = forward(params, window[:, :-1], shape)
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()


def windows(stream: np.ndarray, steps: int, seed: int) -> Iterator[np.ndarray]:
    """One batch of windows i32[windows, length + 1] at random offsets per step, phase by phase."""
    rng = np.random.default_rng(seed)
    counts = [round(phase.share * steps) for phase in PHASES]
    counts[0] += steps - sum(counts)
    for phase, count in zip(PHASES, counts, strict=True):
        for _ in range(count):
            starts = rng.integers(0, len(stream) - phase.length - 1, phase.windows)
            yield np.stack([stream[s : s + phase.length + 1] for s in starts])


def save(folder: Path, params: Params, shape: Shape, tokenizer: tokenizers.Tokenizer) -> None:
    """Write the Hugging Face folder: config, weights in bfloat16, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dataclasses.asdict(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, value in (
        ("config.json", config),
        ("generation_config.json", {"bos_token_id": bos, "eos_token_id": eos}),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = {name: np.asarray(value.astype(jnp.bfloat16)) for name, value in params.items()}
    partial = folder / "model.safetensors.partial"
    partial.write_bytes(safetensors.numpy.save(weights, metadata={"format": "pt"}))
    partial.replace(folder / "model.safetensors")


def main() -> None:
    """Train, and write the folder every ``--save-every`` steps and at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="plain text, may be gzipped")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=3400, help="training steps of 1,024 tokens (%(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--save-every", type=int, default=200, help="steps between saves (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    shape = Shape()
    text = read_text(args.text)
    cut = text.rindex("\n\n", 0, int(len(text) * 0.97))
    tokenizer = train_tokenizer(text, shape.vocab_size)
    stream = encode(text[:cut], tokenizer, args.seed)
    rest = encode(text[cut:], tokenizer, args.seed)
    held_out = jnp.asarray(rest[: len(rest) // 257 * 257].reshape(-1, 257)[:32])
    params = init_params(shape, args.seed)
    print(f"{len(stream)} tokens, {sum(p.size for p in params.values()) / 1e6:.2f}M parameters", flush=True)

    schedule = optax.warmup_cosine_decay_schedule(0.0, args.rate, 100, args.steps, args.rate / 50)
    decayed = {name: value.ndim == 2 for name, value in params.items()}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.1, mask=decayed)
    )
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: optax.OptState, window: jax.Array) -> tuple[Params, optax.OptState, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_fn)(params, window, shape)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    measure = jax.jit(functools.partial(loss_fn, shape=shape))
    begin, recent = time.monotonic(), []
    for number, window in enumerate(windows(stream, args.steps, args.seed), 1):
        params, state, loss = step(params, state, window)
        recent.append(float(loss))
        if number % 50 == 0 or number == args.steps:
            print(
                f"step {number}/{args.steps}  loss {np.mean(recent[-50:]):.3f}  "
                f"held out {measure(params, held_out):.3f}  {time.monotonic() - begin:.0f} s",
                flush=True,
            )
        if number % args.save_every == 0 or number == args.steps:
            save(args.out, params, shape, tokenizer)


if __name__ == "__main__":
    main()
