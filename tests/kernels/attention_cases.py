"""Random ragged batches with poisoned pages, and what attention must make of them, in float64."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jmemserve.kernels import Ragged
from jmemserve.kernels.rule import Rule

Rows = list[tuple[int, int]]  # (context, new tokens) of each


@dataclasses.dataclass(frozen=True)
class Sizes:
    """K, G, H, L of the kernels, the tokens of a block, and the types of activations and pages."""

    kv_heads: int = 2
    group: int = 3
    head: int = 8
    layers: int = 2
    block: int = 16
    dtype: str = "float32"
    kv_dtype: str | None = None  # that of the activations

    def rule(self, window: int | None = None, soft_cap: float | None = None) -> Rule:
        return Rule(self.head**-0.5, window, soft_cap)


@dataclasses.dataclass
class Case:
    """One layer's work for a batch; memory that nobody may read is NaN."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    pages: jax.Array
    ragged: Ragged
    layer: int
    rows: Rows
    keys: list[np.ndarray]  # of each row: [2, context, K, H] in float64, as the pages hold them

    def pages_of(self, aggregated: bool, fold: int = 1, stored: int = 0):
        *lead, size, head = self.pages.shape
        stored = stored or head
        pages = jnp.pad(self.pages, [(0, 0)] * (len(lead) + 1) + [(0, stored - head)])
        pages = pages.reshape(*lead, size // fold, stored * fold)
        return pages if aggregated else tuple(pages[:, layer] for layer in range(pages.shape[1]))

    @property
    def used(self) -> int:
        return sum(new for _, new in self.rows)


def make_case(seed: int, rows: Rows, sizes: Sizes, num_tokens: int = 0, num_rows: int = 0, layer: int = 1) -> Case:
    """A batch in which every row's pages are scattered at random; padded to num_tokens and num_rows."""
    rng = np.random.default_rng(seed)
    num_tokens, num_rows = max(num_tokens, sum(new for _, new in rows)), max(num_rows, len(rows))
    size, dtype, kv_dtype = sizes.block, jnp.dtype(sizes.dtype), jnp.dtype(sizes.kv_dtype or sizes.dtype)
    needed = [-(-context // size) for context, _ in rows]
    width = max(1, *needed)
    num_pages = 1 + sum(needed) + 2
    pages = np.full((num_pages, sizes.layers, 2, sizes.kv_heads, size, sizes.head), np.nan, kv_dtype)
    free = list(rng.permutation(np.arange(1, num_pages)))
    tables = np.zeros((num_rows, width), np.int32)
    context, starts = np.zeros(num_rows, np.int32), np.zeros(num_rows + 1, np.int32)
    slots, positions = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int32)
    q = rng.normal(size=(num_tokens, sizes.kv_heads * sizes.group, sizes.head)).astype(dtype)
    new_kv = rng.normal(size=(2, num_tokens, sizes.kv_heads, sizes.head)).astype(dtype)
    keys, token = [], 0
    for b, (total, new) in enumerate(rows):
        table = np.array([free.pop() for _ in range(needed[b])], np.int32)
        tables[b, : len(table)] = table
        kv = rng.normal(size=(2, total, sizes.kv_heads, sizes.head)).astype(kv_dtype)
        place = np.arange(total)
        old, fresh = place[: total - new], place[total - new :]
        for half in (0, 1):
            pages[table[old // size], layer, half, :, old % size] = kv[half, old]
        kv[:, fresh] = new_kv[:, token : token + new].astype(kv_dtype)
        slots[token : token + new] = table[fresh // size] * size + fresh % size
        positions[token : token + new] = fresh
        token += new
        context[b], starts[b + 1] = total, token
        keys.append(kv.astype(np.float64))
    starts[len(rows) + 1 :] = token
    ragged = Ragged(*(jnp.asarray(x) for x in (positions, slots, tables, context, starts)))
    arrays = (jnp.asarray(x) for x in (q, new_kv[0], new_kv[1], pages))
    return Case(*arrays, ragged, layer, rows, keys)


def expected(case: Case, sizes: Sizes, rule: Rule, sinks: np.ndarray | None = None) -> np.ndarray:
    """f64 [used tokens, N, H]."""
    out, token = [], 0
    q = np.asarray(case.q).astype(np.float64)
    for (total, new), (k, v) in zip(case.rows, case.keys, strict=True):
        for place in range(total - new, total):
            low = 0 if rule.window is None else max(0, place - rule.window + 1)
            heads = q[token].reshape(sizes.kv_heads, sizes.group, sizes.head)
            scores = np.einsum("kgh,skh->kgs", heads, k[low : place + 1]) * rule.scale
            if rule.soft_cap is not None:
                scores = rule.soft_cap * np.tanh(scores / rule.soft_cap)
            if sinks is not None:
                extra = sinks.astype(np.float64).reshape(sizes.kv_heads, sizes.group, 1)
                scores = np.concatenate((scores, extra), -1)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            seen = weights[..., : place + 1 - low]
            out.append(np.einsum("kgs,skh->kgh", seen, v[low : place + 1]).reshape(-1, sizes.head))
            token += 1
    return np.array(out)


def check(
    attend: Callable,
    case: Case,
    sizes: Sizes,
    rule: Rule,
    sinks: np.ndarray | None = None,
    aggregated: bool = True,
    rtol: float = 2e-5,
    atol: float = 2e-6,
    fold: int = 1,
    stored: int = 0,
) -> None:
    """Run a backend's ``attend`` on a case: outputs close to float64, new keys and values exactly where they belong,
    nothing else in the pages touched, and padding finite. ``stored``: what a head takes in the pages, if it is more."""

    @jax.jit
    def call(q, k, v, pages, ragged, sinks):
        return attend(q, k, v, pages, case.layer, ragged, rule, sinks)

    given = None if sinks is None else jnp.asarray(sinks)
    out, pages = call(case.q, case.k, case.v, case.pages_of(aggregated, fold, stored), case.ragged, given)
    got = np.asarray(out).astype(np.float64)
    np.testing.assert_allclose(got[: case.used], expected(case, sizes, rule, sinks), rtol=rtol, atol=atol)
    assert np.isfinite(got).all(), "tokens of padding must be finite"
    whole = np.asarray(pages if aggregated else jnp.stack(pages, 1)).reshape(*case.pages.shape[:-1], -1)
    assert not whole[1:, ..., sizes.head :].any(), "what is more than a head stays zero"
    whole = np.ascontiguousarray(whole[..., : sizes.head])
    size, wanted = sizes.block, np.asarray(case.pages).copy()
    slots = np.asarray(case.ragged.slots)[: case.used]
    for half, new in enumerate((case.k, case.v)):
        wanted[slots // size, case.layer, half, :, slots % size] = np.asarray(new)[: case.used].astype(wanted.dtype)
    as_bytes = whole[1:].view(np.uint8), wanted[1:].view(np.uint8)  # page 0 is nobody's
    np.testing.assert_array_equal(*as_bytes)
