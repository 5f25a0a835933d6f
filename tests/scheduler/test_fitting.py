"""Constants of the cost model from measurements, and how they follow what an instance really does."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmemserve.errors import ConfigError
from jmemserve.scheduler.cost_model import CostModel, Profile, visited, work
from jmemserve.scheduler.fitting import ArchModel, Sample, fit, mean_error, nnls, per_call_and_item, typical
from jmemserve.scheduler.plan import StepShape
from jmemserve.scheduler.refining import ENOUGH, Refiner

TRUE = Profile(
    ((1, 1, 0.008), (4, 4, 0.012), (16, 16, 0.02), (64, 16, 0.03), (256, 16, 0.09), (512, 16, 0.17)),
    pair_s=2e-7,
    context_s=4e-6,
    tile=128,
)
SHAPES = [StepShape(tokens, seqs) for tokens, seqs, _ in TRUE.steps]


def samples(noise: float = 0.0, shapes: list[StepShape] = SHAPES) -> list[Sample]:
    rng, out = random.Random(0), []
    for shape in shapes:
        for start in (0, 500, 2000):
            ones = shape.tokens == shape.seqs
            rows = [(start, 1)] * shape.seqs if ones else [(start, shape.tokens)]
            seconds = CostModel(TRUE).rows_s(shape, rows) * (1 + noise * rng.uniform(-1, 1))
            out.append(Sample(shape, *work(shape, rows, TRUE.tile), seconds))
    return out


def prefill_error(profile: Profile) -> float:
    cases = [(tokens, cached) for tokens in (20, 100, 500, 1500, 4000) for cached in (0, tokens // 4, tokens // 2)]
    true, fitted = CostModel(TRUE), CostModel(profile)
    return mean_error([(fitted.prefill_s(*case), true.prefill_s(*case)) for case in cases])


def test_constants_are_recovered() -> None:
    exact = fit(samples(), SHAPES, TRUE.tile)
    assert exact.pair_s == pytest.approx(TRUE.pair_s) and exact.context_s == pytest.approx(TRUE.context_s)
    assert [step[2] for step in exact.steps] == pytest.approx([step[2] for step in TRUE.steps])
    assert prefill_error(fit(samples(0.05), SHAPES, TRUE.tile)) < 0.04


def test_outliers_are_left_out() -> None:
    """A machine that was busy for two of the steps."""
    spoilt = samples(0.02)
    for place in (7, 16):
        spoilt[place] = Sample(*[getattr(spoilt[place], name) for name in ("shape", "pairs", "context")], 5.0)
    assert prefill_error(fit(spoilt, SHAPES, TRUE.tile)) < 0.05
    assert typical([3.0, 1.0, 9.0, 2.0]) == 2.0


def test_shapes_that_were_not_measured_lie_between() -> None:
    measured = [shape for shape in SHAPES if shape.tokens not in (4, 256)]
    steps = dict(((t, s), seconds) for t, s, seconds in fit(samples(shapes=measured), SHAPES, TRUE.tile).steps)
    assert set(steps) == {(shape.tokens, shape.seqs) for shape in SHAPES}
    assert steps[64, 16] < steps[256, 16] < steps[512, 16] and steps[1, 1] < steps[4, 4] < steps[16, 16]
    small = fit(samples(shapes=SHAPES[3:4]), SHAPES, TRUE.tile)  # one shape only: the larger in proportion
    assert small.steps[-1][2] == pytest.approx(small.steps[-3][2] * 512 / 64)
    with pytest.raises(ConfigError, match="no step of more tokens than sequences"):
        fit(samples(shapes=SHAPES[:3]), SHAPES)


def test_predictions_never_fall_with_more_work() -> None:
    """More to compute with the same cached, or less cached: never cheaper, but for how a prompt is cut into steps."""
    model = CostModel(fit(samples(0.1), SHAPES, TRUE.tile))
    for tokens in range(512, 4096, 512):
        assert model.prefill_s(tokens, 0) < model.prefill_s(tokens + 512, 0)
        assert model.prefill_s(tokens + 512, 0) > model.prefill_s(tokens + 512, 512)
    for rows in range(1, 16):
        assert model.decode_step_s(rows, 100) <= model.decode_step_s(rows + 1, 100)
        assert model.decode_step_s(rows, 100) < model.decode_step_s(rows, 1000)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 700), st.integers(1, 512), st.sampled_from([1, 4, 16, 128]))
def test_visited_pairs_are_those_of_whole_tiles(start: int, length: int, tile: int) -> None:
    """Against the loop that the kernel runs: tiles of queries, in each the tiles of keys up to its last query."""
    tokens, loop = 512, 0
    for first in range(0, length, tile):
        last = start + min(first + tile, length)
        loop += tile * tile * -(-last // tile)
    assert visited(tokens, start, length, tile) == loop
    if tile == 1:
        whole = start + length
        assert loop == (whole * (whole + 1) - start * (start + 1)) / 2


def test_prompts_are_cut_as_the_scheduler_cuts_them() -> None:
    """520 tokens are a step of 512 and one of 64, and no second one of 512; 300 are 256 and 64."""
    flat = CostModel(Profile(((64, 16, 1.0), (256, 16, 10.0), (512, 16, 100.0))))
    assert flat.prefill_s(520, 0) == 101.0
    assert flat.prefill_s(300, 0) == 11.0
    assert flat.prefill_s(400, 0) == 100.0
    assert flat.prefill_s(1024, 512) == 100.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_nnls_is_the_best_without_negative_parts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(8, 3)), rng.normal(size=8)
    x = nnls(matrix, target)
    assert (x >= 0).all()
    slope = matrix.T @ (target - matrix @ x)  # at the optimum: none upwards, and flat where x is above 0
    assert slope.max() < 1e-6 and np.abs(slope[x > 0]).max(initial=0) < 1e-6


def test_costs_per_call_and_item() -> None:
    call, item = per_call_and_item([(1, 0.0021), (4, 0.0024), (64, 0.0084)])
    assert call == pytest.approx(0.002) and item == pytest.approx(1e-4)
    assert per_call_and_item([]) == (0.0, 0.0)
    assert per_call_and_item([(8, 0.8), (8, 0.8)])[1] >= 0


def test_the_architecture_level_fits_one_machine_only() -> None:
    """It is made from whole prefills; halved, it is what the paper does at two devices."""
    points = [(x, c, 0.01 + 1e-4 * x + 1e-8 * (x * x - c * x)) for x in range(62, 4000, 400) for c in (0, x // 4)]
    model = ArchModel.fit(points)
    assert mean_error([(model.prefill_s(x, c), seconds) for x, c, seconds in points]) < 1e-6
    assert model.scaled(0.5).prefill_s(1000, 0) == pytest.approx(model.prefill_s(1000, 0) / 2)
    with pytest.raises(ConfigError, match="not 4"):
        ArchModel.fit(points[:4])


def test_a_profile_is_a_file() -> None:
    fitted = fit(samples(0.05), SHAPES, TRUE.tile, about="here")
    assert Profile.from_json(fitted.to_json()) == fitted


@pytest.mark.parametrize(
    "change, says",
    [
        ({"pair_s": -1.0}, "pair_s of a profile"),
        ({"swap_call_s": "fast"}, "swap_call_s of a profile"),
        ({"context_s": float("inf")}, "context_s"),
        ({"steps": [[64, 16, 0.0]]}, "a step of a profile"),
        ({"steps": [[8, 16, 0.1]]}, "a step of a profile"),
        ({"steps": [[8, 8, 0.1]]}, "needs a step of more tokens than sequences"),
        ({"steps": [[64, 16, 0.1], [64, 16, 0.2]]}, "two steps for the same number"),
        ({"steps": [[64, 16, 0.1], [64, 8, 0.2]]}, "two steps for the same number"),
        ({"steps": [[64.5, 16, 0.1]]}, "not a whole number"),
        ({"steps": [[64, 16, 1e300]]}, "seconds up to"),
        ({"steps": 7}, "not a profile"),
        ({"tile": 0}, "tile of a profile"),
        ({"about": None}, "about of a profile"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_malformed_profile_is_refused_in_words(change: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Profile.from_json(json.dumps(json.loads(TRUE.to_json()) | change))
    for text in ("", "[]", "null", "{}"):
        with pytest.raises(ConfigError, match="not a profile"):
            Profile.from_json(text)


# -- online -----------------------------------------------------------------------------------------------------------

PROMPT = (StepShape(512, 16), [(0, 500), (30, 1)])
DECODE = (StepShape(4, 4), [(100, 1)] * 3)
WORK_OF_PROMPT = (PROMPT[0], 501, *work(*PROMPT, TRUE.tile))
WORK_OF_DECODE = (DECODE[0], 3, *work(*DECODE, TRUE.tile))


def test_a_profile_follows_a_machine_that_gets_slower() -> None:
    """Packed steps take twice as long as was measured; the others do not change."""
    refiner, model = Refiner(TRUE), CostModel(TRUE)
    for _ in range(60):
        refiner.step(*WORK_OF_PROMPT, 2 * model.rows_s(*PROMPT))
        refiner.step(*WORK_OF_DECODE, model.rows_s(*DECODE))
    news = refiner.news()
    assert news is not None and refiner.news() is None
    assert CostModel(news).prefill_s(1500, 0) == pytest.approx(2 * model.prefill_s(1500, 0), rel=0.01)
    assert CostModel(news).decode_step_s(4, 100) == model.decode_step_s(4, 100)
    assert refiner.error == pytest.approx(0.25, abs=0.05)  # of half of the steps, half
    for _ in range(200):
        refiner.step(*WORK_OF_PROMPT, 2 * model.rows_s(*PROMPT))
    assert refiner.error < 0.02 and refiner.news() is None


def test_a_hiccup_is_no_news() -> None:
    refiner, model = Refiner(TRUE), CostModel(TRUE)
    for number in range(100):
        refiner.step(*WORK_OF_PROMPT, model.rows_s(*PROMPT) * (100 if number == 20 else 1.02))
    assert refiner.news() is None and refiner.profile == TRUE
    early = Refiner(TRUE)
    for _ in range(ENOUGH - 1):
        early.step(*WORK_OF_PROMPT, 9.0)
    assert early.news() is None


def test_transfers_and_swaps_are_learnt() -> None:
    refiner = Refiner(TRUE)
    for blocks in range(1, 40):
        refiner.transfer(blocks, 0.004 + 0.0002 * blocks)
        refiner.swap(blocks, 0.001 + 0.0001 * blocks)
    refiner.transfer(0, 0.5)  # all was there: says nothing of bytes
    news = refiner.news()
    assert news is not None
    assert CostModel(news).transfer_s(10) == pytest.approx(0.006)
    assert CostModel(news).swap_in_s(10) == pytest.approx(0.002)


def test_without_a_profile_nothing_is_compared() -> None:
    refiner = Refiner()
    refiner.step(*WORK_OF_PROMPT, 1.0)
    refiner.transfer(3, 1.0)
    assert refiner.news() is None and refiner.profile is None and refiner.error == 0.0


def test_where_padding_is_free_a_step_costs_what_its_tokens_cost() -> None:
    steps = ((1, 1, 0.010), (8, 8, 0.014), (64, 8, 0.020), (512, 8, 0.100))
    plain, free = CostModel(Profile(steps)), CostModel(Profile(steps, padding_free=True))
    for shape, rows in (
        (StepShape(64, 8), [(0, 64)]),
        (StepShape(512, 8), [(0, 512)]),
        (StepShape(8, 8), [(5, 1)] * 8),
    ):
        assert plain.rows_s(shape, rows) == free.rows_s(shape, rows), "a full step"
    assert plain.rows_s(StepShape(512, 8), [(0, 288)]) == 0.100
    assert free.rows_s(StepShape(512, 8), [(0, 288)]) == pytest.approx(0.060)
    assert free.rows_s(StepShape(8, 8), [(3, 1)]) == pytest.approx(0.010)
    assert free.prefill_s(600, 584) < plain.prefill_s(600, 584) == 0.020
    assert Profile.from_json(free.profile.to_json()) == free.profile
