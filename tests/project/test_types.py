"""Sampling parameters: what can never work is refused with the field's name, whatever type a caller in Python gives."""

import math

import pytest

from jmemserve.errors import InvalidRequest
from jmemserve.types import SamplingParams


@pytest.mark.parametrize(
    "field,values",
    [
        ("temperature", [-1, math.nan, math.inf, "hot", True, None]),
        ("top_k", [-2, 1.5, 2**40, "3", None, True]),
        ("top_p", [0, -0.1, 1.1, math.nan, "1"]),
        ("min_p", [-0.1, 2, math.nan]),
        ("repetition_penalty", [0, -1, 1e-50, math.nan]),
        ("presence_penalty", [-3, 3, math.nan]),
        ("frequency_penalty", [-3, 3, math.nan]),
        ("seed", [-1, 2**63, 1.5, "x"]),
        ("max_tokens", [0, -1, 3.5, "3"]),
        ("min_tokens", [-1, 1.5, None]),
        ("stop", [[""], ["a"] * 17, [1]]),
        ("stop_token_ids", [[1.5], ["a"], [True], list(range(17))]),
        ("logprobs", [-1, 21, 1.5]),
        ("n", [0, 65, 2.0, None]),
    ],
)
def test_bad_values_are_refused_by_name(field: str, values: list) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=field):
            SamplingParams(**{field: value}).check()


def test_good_values_pass() -> None:
    SamplingParams().check()
    SamplingParams(temperature=0, top_k=-1, top_p=1e-50, max_tokens=1, logprobs=0, n=64).check()
    assert SamplingParams(stop="abc").stop == ("abc",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[1]) == SamplingParams(stop=("a", "b"), stop_token_ids=(1,))
