"""Heads that no kernel has tiles for take more in the pages, and that changes nothing but the room that they need."""

from functools import partial

import jax
import numpy as np
import pytest
from attention_cases import Rows, Sizes, check, make_case
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from jmemserve.engine.selftest import check_arithmetic
from jmemserve.kernels import attention_backend, fold_of, stored_head
from jmemserve.kernels.choice import Need, choose

GPU, TPU = plgpu.InterpretGPUParams(detect_races=True), pltpu.InterpretParams(detect_races=True)
MIXED: Rows = [(70, 1), (40, 23), (9, 2)]


@pytest.mark.parametrize(
    "name, interpret, head, stored, dtype",
    [
        ("mosaic_gpu", GPU, 72, 80, "bfloat16"),
        ("mosaic_ampere", GPU, 72, 96, "float16"),
        ("tpu", TPU, 80, 128, "float32"),
        ("tpu", TPU, 24, 32, "float32"),  # of which four tokens lie side by side
    ],
)
@pytest.mark.parametrize("rows", [MIXED, [(70, 1), (33, 1)]], ids=["mixed", "ones"])
def test_the_same_attention(name: str, interpret, head: int, stored: int, dtype: str, rows: Rows) -> None:
    assert stored_head(name, head) == stored
    sizes = Sizes(1, 2, head, 2, 32, dtype)
    close = {"float32": {}, "float16": {"rtol": 2e-3, "atol": 2e-3}}.get(dtype, {"rtol": 1.5e-2, "atol": 1.5e-2})
    attend = partial(attention_backend(name), interpret=interpret)
    for aggregated in (True, False):
        fold = fold_of(name, head)
        check(
            attend, make_case(4, rows, sizes), sizes, sizes.rule(), None, aggregated, fold=fold, stored=stored, **close
        )


@pytest.mark.parametrize("name", ["cpu", "xla", "reference"])
def test_others_store_what_there_is(name: str) -> None:
    assert [stored_head(name, head) for head in (1, 24, 72, 300)] == [1, 24, 72, 300]


@pytest.mark.parametrize(
    "platform, kind, name",
    [("gpu", "NVIDIA H200", "mosaic_gpu"), ("gpu", "NVIDIA L4", "mosaic_ampere"), ("tpu", "TPU v5 lite", "tpu")],
)
@pytest.mark.parametrize("head", [8, 40, 72, 100, 120, 144, 200])
def test_every_head_is_served(platform: str, kind: str, name: str, head: int) -> None:
    need = Need(platform, kind, "bfloat16", 8, 4, head, 256, 32)
    assert choose("auto", need).name == name
    assert stored_head(name, head) >= head and stored_head(name, stored_head(name, head)) == stored_head(name, head)


def test_the_self_test_knows_it() -> None:
    need = Need("tpu", "TPU v5 lite", "float32", 1, 2, 24, 32, 1)
    with pltpu.force_tpu_interpret_mode():
        assert check_arithmetic(jax.devices("cpu")[0], "tpu", need) < 1e-4


def test_a_head_is_not_mixed_up_with_what_is_beside_it() -> None:
    """With a value of its own in each number, all of a head comes back and nothing else."""
    sizes = Sizes(1, 1, 24, 1, 32, "float32")
    case = make_case(0, [(1, 1)], sizes, layer=0)
    attend = partial(attention_backend("tpu"), interpret=TPU)
    pages = case.pages_of(True, fold_of("tpu", 24), stored_head("tpu", 24))
    out, _ = attend(case.q, case.k, case.v, pages, 0, case.ragged, sizes.rule())
    np.testing.assert_allclose(np.asarray(out)[0, 0], np.asarray(case.v)[0, 0], rtol=1e-6)
