"""The experts of one layer, as an accelerator multiplies with them: in few products, each large.

An accelerator reads a weight in about the time in which it multiplies it with SPAN columns, so with fewer columns it
does not matter how many there are, nor whose. Weights are used as they lie, without a copy:

    by_pairs      each (token, expert) pair reads the weights that it needs, into a product with one column
    all_at_once   every expert takes all tokens; what it makes of those that did not choose it counts nothing
    in_rounds     every expert takes the next SPAN tokens of those that chose it, until none are left

All have gate_up [E, F, 2, D], down [E, D, F] and x [D, T], and return f32[D, T].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SPAN = 256  # columns


class Matrices(NamedTuple):
    """One per expert."""

    values: jax.Array  # [E, ..., in]
    scale: jax.Array | None  # [E, ..., 1], if they are quantized

    def columns(self, x: jax.Array) -> jax.Array:
        """With columns that all take [in, T], or each its own [E, in, T]: [E, ..., T], rounded to their type."""
        columns, values = "kt" if x.ndim == 2 else "ekt", self.values.astype(x.dtype)
        out = jnp.einsum(f"e...k,{columns}->e...t", values, x, preferred_element_type=jnp.float32)
        return (out if self.scale is None else out * self.scale).astype(x.dtype)

    def rows(self, x: jax.Array) -> jax.Array:
        """The same of columns each its own [E, in, T], and turned: [E, T, ...]."""
        values = self.values.astype(x.dtype)
        out = jnp.einsum("ekt,e...k->et...", x, values, preferred_element_type=jnp.float32)
        return (out if self.scale is None else out * self.scale[:, None, ..., 0]).astype(x.dtype)

    def of_pairs(self, expert: jax.Array, x: jax.Array) -> jax.Array:
        """Of the experts i32[P] with a row each [P, in]: [P, ...], rounded to their type."""
        values = self.values[expert].astype(jnp.float32)
        # Written as a sum, which XLA lets read the weights where they are; for a product it would copy them together.
        out = jnp.sum(values * x.reshape(len(x), *(1,) * (values.ndim - 2), -1), axis=-1)
        return (out if self.scale is None else out * self.scale[expert][..., 0]).astype(x.dtype)


class Routes(NamedTuple):
    """Which experts each token goes to. The number behind the last expert is nobody."""

    chosen: jax.Array  # i32[T, k]
    share: jax.Array  # f32[T, k]

    def among(self, first: jax.Array | int, count: int) -> "Routes":
        """The same to those who see these experts alone, and count them from 0."""
        own = (self.chosen >= first) & (self.chosen < first + count)
        return Routes(jnp.where(own, self.chosen - first, count), self.share)


def by_pairs(gate_up: Matrices, down: Matrices, x: jax.Array, routes: Routes) -> jax.Array:
    """Good where far fewer experts are needed than there are."""
    tokens, k = routes.chosen.shape
    nobody = gate_up.values.shape[0]
    expert = jnp.minimum(routes.chosen, nobody - 1).reshape(-1)
    both = gate_up.of_pairs(expert, jnp.repeat(x.T, k, axis=0))  # P F 2
    made = down.of_pairs(expert, jax.nn.silu(both[..., 0]) * both[..., 1])
    return _sum(made.reshape(tokens, k, -1), routes.share, routes.chosen < nobody).T


def all_at_once(gate_up: Matrices, down: Matrices, x: jax.Array, routes: Routes) -> jax.Array:
    """Good up to SPAN tokens."""
    each = jnp.arange(gate_up.values.shape[0])[:, None, None]
    share = jnp.sum(jnp.where(routes.chosen[None] == each, routes.share[None], 0), axis=-1)  # E T
    both = gate_up.columns(x)
    # Zero where nobody asked: it might be too large for the type.
    inner = jnp.where(share[:, None] > 0, jax.nn.silu(both[:, :, 0]) * both[:, :, 1], 0)
    return jnp.sum(down.rows(inner) * share[..., None], axis=0).T


def in_rounds(gate_up: Matrices, down: Matrices, x: jax.Array, routes: Routes) -> jax.Array:
    """Good for more."""
    tokens, k = routes.chosen.shape
    nobody = gate_up.values.shape[0]
    order, counts, starts = sort(routes, nobody)
    place = (jnp.argsort(order) - jnp.append(starts, 0)[routes.chosen.reshape(-1)]).reshape(tokens, k)  # at its expert
    rows = x.T

    def one_round(number: jax.Array, out: jax.Array) -> jax.Array:
        since = number * SPAN
        # Behind the last one of an expert come those of others: nobody will ask for what is made of them.
        pair = order.at[(starts + since)[:, None] + jnp.arange(SPAN)[None]].get(mode="clip")
        given = rows[pair // k]  # E SPAN D
        both = gate_up.columns(given.mT)
        made = down.rows(jax.nn.silu(both[:, :, 0]) * both[:, :, 1])  # E SPAN D
        here = (place >= since) & (place < since + SPAN) & (routes.chosen < nobody)
        of_pair = made.at[routes.chosen, place - since].get(mode="clip")  # T k D
        return out + _sum(of_pair, routes.share, here)

    rounds = -(-jnp.max(counts) // SPAN)
    return lax.fori_loop(0, rounds, one_round, jnp.zeros(rows.shape, jnp.float32)).T


def sort(routes: Routes, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pairs (token * k + place) by expert; how many each of the experts has, and where they begin."""
    chosen = routes.chosen.reshape(-1)
    counts = jnp.zeros(count, jnp.int32).at[chosen].add(1, mode="drop")
    return jnp.argsort(chosen, stable=True), counts, jnp.cumsum(counts) - counts


def _sum(made: jax.Array, share: jax.Array, counts: jax.Array) -> jax.Array:
    """[T, k, D] of each pair -> f32[T, D], of those that count."""
    return jnp.sum(jnp.where(counts[..., None], made * share[..., None], 0), axis=1)
