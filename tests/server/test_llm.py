"""The offline class, on a cluster that has no model."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import small_text
from conftest import MAX_LEN, VOCAB, count_up
from fake_cluster import FakeCluster

import jmemserve
from jmemserve import errors, llm
from jmemserve.config import ClusterSpec
from jmemserve.engine.report import Report
from jmemserve.types import Event, FinishReason, Request, SamplingParams

QUEUE = 3


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[llm.LLM, FakeCluster]]:
    small_text.write_folder(tmp_path)
    made = []

    class Cluster(FakeCluster):
        failure = None
        folder = tmp_path
        vocab_size = VOCAB
        max_model_len = MAX_LEN

        def __init__(self, spec: ClusterSpec, report: Report, on_events: Callable[[list[Event]], None]):
            super().__init__(on_events, self.answer, QUEUE)
            made.append(self)

        def answer(self, request: Request) -> Iterator[int]:
            return count_up(request)

        def start(self) -> None:
            pass

    monkeypatch.setattr(llm, "Cluster", Cluster)
    monkeypatch.setattr(llm, "model_folder", lambda engine: tmp_path)
    with jmemserve.LLM(str(tmp_path), mesh="2xcolocated", max_num_seqs=2) as model:
        yield model, made[0]
    assert not made[0].running


def test_more_prompts_than_the_queue_holds(offline: tuple[llm.LLM, FakeCluster]) -> None:
    model, cluster = offline
    params = [SamplingParams(max_tokens=1 + i % 4) for i in range(20)]
    outputs = model.generate([[i] for i in range(20)], params)
    assert [output.tokens for output in outputs] == [tuple(range(i + 1, i + 2 + i % 4)) for i in range(20)]
    assert len({request.id for request in cluster.submitted}) == 20


def test_text_and_several_outputs(offline: tuple[llm.LLM, FakeCluster]) -> None:
    model, _ = offline
    [one] = model.generate("the cat", SamplingParams(max_tokens=2))
    assert one.finish is FinishReason.LENGTH and len(one.tokens) == 2
    outputs = model.generate(["the", "cat"], SamplingParams(max_tokens=2, n=3))
    assert [output.index for output in outputs] == [0, 1, 2, 0, 1, 2]
    assert len({output.request_id for output in outputs}) == 2


def test_who_asks(offline: tuple[llm.LLM, FakeCluster]) -> None:
    model, cluster = offline
    model.generate([[1], [2]], SamplingParams(max_tokens=1), session="s", tenant="t", priority=4)
    assert {(request.session, request.tenant, request.priority) for request in cluster.submitted} == {("s", "t", 4)}
    with pytest.raises(errors.InvalidRequest, match="priority must be"):
        model.generate([[1]], priority=True)


def test_stop_string(offline: tuple[llm.LLM, FakeCluster]) -> None:
    model, cluster = offline
    text = jmemserve.SamplingParams(stop=("d",))
    [output] = model.generate([[ord("a") - 31]], text)
    assert output.finish is FinishReason.STOP and output.matched_stop == "d"
    assert cluster.aborted[0][1] is FinishReason.STOP


@pytest.mark.parametrize("prompts", [[""], [[]], [[VOCAB]], [[1] * MAX_LEN]])
def test_nothing_runs_if_one_prompt_is_wrong(offline: tuple[llm.LLM, FakeCluster], prompts: list[list[int]]) -> None:
    model, cluster = offline
    with pytest.raises(errors.InvalidRequest):
        model.generate([[1], *prompts])
    with pytest.raises(errors.InvalidRequest, match="2 prompts, but 1 params"):
        model.generate([[1], [2]], [SamplingParams()])
    assert cluster.submitted == []


def test_settings_are_checked() -> None:
    with pytest.raises(errors.ConfigError, match="did you mean block_size"):
        jmemserve.LLM(blok_size=8)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        jmemserve.Nothing  # noqa: B018
