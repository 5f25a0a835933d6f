"""Every way to run a mixture of experts beside numpy in float64: on one device and two, plain and in 8 bits."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_driver import Driver
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import dense_attend, model_mesh

from jmemserve.config import LoadFormat, Warmup
from jmemserve.engine import mixing
from jmemserve.engine.mixing import mix_of
from jmemserve.models import ModelConfig, experts, load_config
from jmemserve.models.describe import describe_layer
from jmemserve.models.experts import Matrices, all_at_once, by_pairs, in_rounds
from jmemserve.models.moe import by_tiles, mixture
from jmemserve.models.ops import Mix, Ops
from jmemserve.types import SamplingParams

FIXTURES = Path(__file__).parent / "fixtures"
TOKENS, WIDTH, INNER = 40, 16, 8
FORMS = {form.__name__: form for form in (by_tiles, by_pairs, all_at_once, in_rounds)}
KINDS = [None, "int8"]


def shape_of(count: int, per_token: int, kind: str | None) -> ModelConfig:
    config = load_config(FIXTURES / "mixtral")
    assert config.experts is not None
    some = dataclasses.replace(config.experts, count=count, per_token=per_token, size=INNER)
    config = dataclasses.replace(config, hidden_size=WIDTH, experts=some)
    return config if kind is None else config.round_weights(kind)


def weights_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random ones of one layer's mixture; those in 8 bits with scales that are all different."""
    rng, made = np.random.default_rng(1), {}
    for name, weight in describe_layer(config, 0).items():
        if name.endswith("_scale"):
            made[name] = rng.uniform(0.001, 0.004, weight.shape).astype(np.float32)
        elif weight.dtype == "int8":
            made[name] = rng.integers(-127, 128, weight.shape).astype(np.int8)
        else:
            made[name] = (rng.normal(size=weight.shape) * 0.3).astype(np.float32)
    return {name: array for name, array in made.items() if name.startswith(("router", "experts_"))}


def run(config: ModelConfig, weights: dict[str, np.ndarray], x: np.ndarray, size: int, used: int | None = None):
    """By the form that is in ``mixing.FORMS`` for CPUs."""
    mesh, described = model_mesh(size), describe_layer(config, 0)
    placed = {
        name: jax.device_put(array, NamedSharding(mesh, P(*described[name].spec(dict(mesh.shape)))))
        for name, array in weights.items()
    }
    ops = Ops(dense_attend, mix=mix_of(mesh, config), used=None if used is None else jnp.asarray(used))

    @jax.jit
    def mixed(placed, x):
        halves = (Matrices(placed[name], placed.get(f"{name}_scale")) for name in ("experts_gate_up", "experts_down"))
        return mixture(config.experts, placed["router"], *halves, x, ops)

    compiled = mixed.lower(placed, jax.device_put(x, NamedSharding(mesh, P()))).compile()
    return np.asarray(compiled(placed, x)), compiled.as_text()


def reference(config: ModelConfig, weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Token by token."""
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    gate_up = wide["experts_gate_up"] * wide.get("experts_gate_up_scale", 1)
    down = wide["experts_down"] * wide.get("experts_down_scale", 1)
    out = np.zeros(x.shape)
    for token, column in enumerate(x.T.astype(np.float64)):
        scores = np.exp(wide["router"] @ column)
        chosen = np.argsort(-scores, kind="stable")[: config.experts.per_token]
        for expert, share in zip(chosen, scores[chosen] / scores[chosen].sum(), strict=True):
            gate, up = (gate_up[expert, :, half] @ column for half in (0, 1))
            out[:, token] += share * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.fixture(params=FORMS)
def form(request, monkeypatch) -> str:
    """What CPUs run, in place of what is theirs."""
    monkeypatch.setitem(mixing.FORMS, "cpu", FORMS[request.param])
    monkeypatch.setattr(experts, "SPAN", 6)  # so that there are several rounds
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("count", [6, 5])  # of which two devices can have three each, or half of each
def test_random_routers(form: str, count: int, size: int, kind: str | None) -> None:
    config = shape_of(count, 2, kind)
    weights, x = weights_of(config), np.random.default_rng(2).normal(size=(WIDTH, TOKENS)).astype(np.float32)
    found, program = run(config, weights, x, size)
    np.testing.assert_allclose(found, reference(config, weights, x), rtol=1e-4, atol=1e-5)
    assert program.count(" all-reduce(") == size - 1, "one sum of all devices, and not in a loop"


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3, TOKENS])
def test_experts_that_nobody_goes_to_change_nothing(form: str, tokens: int, size: int) -> None:
    """All go to the same two of six; what the others make is no number."""
    config = shape_of(6, 2, None)
    weights, x = weights_of(config), np.random.default_rng(3).uniform(0.5, 1, (WIDTH, tokens)).astype(np.float32)
    weights["router"] += np.array([-1, 1, -1, -1, 1, -1], np.float32)[:, None]
    weights["experts_gate_up"][[0, 2, 3, 5]] = np.nan
    found, _ = run(config, weights, x, size)
    np.testing.assert_allclose(found, reference(config, weights, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("used", [0, 1, 17, TOKENS])
def test_padding_goes_to_nobody(form: str, used: int, size: int) -> None:
    config = shape_of(6, 2, None)
    weights, x = weights_of(config), np.random.default_rng(4).normal(size=(WIDTH, TOKENS)).astype(np.float32)
    x[:, used:] = 1
    found, _ = run(config, weights, x, size, used)
    np.testing.assert_allclose(found[:, :used], reference(config, weights, x)[:, :used], rtol=1e-4, atol=1e-5)
    assert not found[:, used:].any()


# By tokens, with 8 experts and 2 per token: few pairs, up to SPAN, more.
CHOICES = {
    "gpu": {2: by_pairs, 3: all_at_once, 6: all_at_once, 7: in_rounds},
    "tpu": {2: by_tiles, 3: all_at_once, 6: all_at_once, 7: by_tiles},
}


@pytest.mark.parametrize("platform", CHOICES)
def test_the_form_is_chosen_by_size(platform: str, monkeypatch) -> None:
    taken: list[str] = []

    def noting(name: str) -> Mix:
        return lambda *given, **more: taken.append(name) or FORMS[name](*given, **more)

    monkeypatch.setattr(mixing, "SPAN", 6)
    for name in FORMS:
        monkeypatch.setattr(mixing, name, noting(name))
    monkeypatch.setitem(mixing.FORMS, "cpu", mixing.FORMS[platform])
    config = shape_of(8, 2, None)
    for tokens in CHOICES[platform]:
        run(config, weights_of(config), np.ones((WIDTH, tokens), np.float32), 1)
    assert taken == [form.__name__ for form in CHOICES[platform].values()]


@pytest.mark.parametrize(
    ("name", "mesh", "platform"),
    [("mixtral", "colocated", "gpu"), ("qwen3_moe", "colocated:2", "gpu"), ("mixtral", "colocated:2", "tpu")],
)
def test_the_engine_makes_the_same_tokens(name: str, mesh: str, platform: str, monkeypatch) -> None:
    """As accelerators do it; prompts take several rounds."""
    monkeypatch.setitem(mixing.FORMS, "cpu", mixing.FORMS[platform])
    for module in (mixing, experts):
        monkeypatch.setattr(module, "SPAN", 8)
    with np.load(FIXTURES / name / "reference.npz") as arrays:
        prompts, wanted = ([arrays[f"{part}{n}"].tolist() for n in range(3)] for part in ("prompt", "greedy"))
    params = SamplingParams(temperature=0, max_tokens=len(wanted[0]))
    given = {"load_format": LoadFormat.AUTO, "warmup": Warmup.FAST, "max_model_len": 128}
    with Driver(FIXTURES / name, mesh, **given) as driver:
        assert driver.generate(prompts, params) == wanted
