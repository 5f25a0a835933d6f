"""Is the arithmetic right? A small attention on an instance's first device, beside numpy, before anything is served.

Some releases of XLA have given wrong numbers silently, and a kernel may meet a device that nobody has tried; such a one
is left out, and a server that has no other says so instead of serving.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jmemserve.errors import ConfigError
from jmemserve.kernels import Ragged, attention_backend, fold_of, stored_head
from jmemserve.kernels.choice import Need
from jmemserve.kernels.rule import Rule

# Tokens of each row, and of these the new ones: rows of both kinds together; decoding, a row so long that its keys are
# divided among several thread blocks.
BATCHES = (((70, 3, 33), (40, 1, 5)), ((1500, 3), (1, 1)))
WINDOW, SOFT_CAP = 20, 5.0  # where the model has such


def check_arithmetic(device: jax.Device, attention: str, need: Need) -> float:
    """Largest error of a backend against numpy, in sizes as the model has them. Raises ConfigError if not small."""
    rules = [Rule(need.head_dim**-0.5)]
    if need.window or need.soft_cap:
        rules.append(Rule(need.head_dim**-0.5, WINDOW if need.window else None, SOFT_CAP if need.soft_cap else None))
    errors = [_error(device, attention, need, old, new, rule) for old, new in BATCHES for rule in rules]
    error = float(np.max(errors))  # of numbers and NaN it is NaN
    if not error < 3e-2:  # bfloat16 products of an accelerator's default precision are this good
        raise ConfigError(
            f"this machine computes attention by {attention!r} wrongly (error {error:.3g} beside numpy, jax "
            f"{jax.__version__})"
        )
    return error


def _error(
    device: jax.Device, attention: str, need: Need, contexts: tuple[int, ...], news: tuple[int, ...], rule: Rule
) -> float:
    """Of one batch, the largest."""
    rng = np.random.default_rng(0)
    kv_heads, size, dtype = need.num_kv_heads, need.block_size, jnp.dtype(need.dtype)
    width = -(-max(contexts) // size)
    kv = rng.normal(size=(2, len(contexts), width * size, kv_heads, need.head_dim)).astype(dtype)
    q = rng.normal(size=(sum(news), kv_heads, need.group, need.head_dim)).astype(dtype)
    tables = 1 + rng.permutation(len(contexts) * width).astype(np.int32).reshape(len(contexts), width)
    pages = np.zeros((1 + tables.size, 1, 2, kv_heads, size, need.head_dim), dtype)
    pages[tables, 0] = kv.reshape(2, *tables.shape, size, kv_heads, -1).transpose(1, 2, 0, 4, 3, 5)
    row = np.repeat(np.arange(len(news)), news)
    starts = np.cumsum((0, *news)).astype(np.int32)
    position = (np.array(contexts)[row] - starts[1:][row] + np.arange(len(row))).astype(np.int32)
    slots = (tables[row, position // size] * size + position % size).astype(np.int32)
    with jax.default_device(device):
        ragged = Ragged(*(jnp.asarray(x) for x in (position, slots, tables, np.array(contexts, np.int32), starts)))
        given = (jnp.asarray(x) for x in (q.reshape(len(row), -1, need.head_dim), *kv[:, row, position]))
        fold, stored = fold_of(attention, need.head_dim), stored_head(attention, need.head_dim)
        pages = np.pad(pages, ((0, 0),) * 5 + ((0, stored - need.head_dim),))
        pages = pages.reshape(*pages.shape[:-2], size // fold, stored * fold)
        laid = jnp.asarray(pages) if need.aggregated else (jnp.asarray(pages[:, 0]),)
        kernel = attention_backend(attention)
        run = jax.jit(lambda q, k, v, pages: kernel(q, k, v, pages, 0, ragged, rule)[0])
        got = np.asarray(run(*given, laid)).astype(np.float64)
    errors = []
    for token, (b, place) in enumerate(zip(row, position, strict=True)):
        first = 0 if rule.window is None else max(0, place + 1 - rule.window)
        k, v = kv[:, b, first : place + 1].astype(np.float64)
        scores = np.einsum("kgh,skh->kgs", q[token].astype(np.float64), k) * rule.scale
        if rule.soft_cap is not None:
            scores = rule.soft_cap * np.tanh(scores / rule.soft_cap)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("kgs,skh->kgh", weights, v).reshape(-1, need.head_dim)
        errors.append(np.abs(got[token] - expected).max())
    return float(np.max(errors))
