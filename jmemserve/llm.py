"""The engine without a server: ``LLM("demo", mesh="colocated").generate("Once upon a time")``."""

import itertools
import queue
import random
import time
from collections.abc import Sequence
from typing import Any, Self

from jmemserve.config import ClusterSpec, parse_mesh
from jmemserve.devices import arrange_cpu_devices
from jmemserve.engine.build import model_folder
from jmemserve.engine.cluster import Cluster
from jmemserve.engine.report import Report, SilentReport
from jmemserve.errors import InvalidRequest, Overloaded, Unavailable
from jmemserve.server.flags import make_engine_config
from jmemserve.server.generation import Generation
from jmemserve.server.messages import Message, Output, fold
from jmemserve.server.model import load_model
from jmemserve.server.text import load_text
from jmemserve.types import Event, FinishReason, Request, SamplingParams


class LLM:
    """A model on this process's devices. Close it, or use it in a ``with`` statement. For one thread at a time."""

    def __init__(self, model: str = "demo", mesh: str = "colocated", report: Report | None = None, **engine: Any):
        """``engine`` takes the server's flags with underscores, ``max_model_len=512`` for one.

        Raises ConfigError or CheckpointError that says what to change.
        """
        config = make_engine_config({"model": model, **engine})
        spec = ClusterSpec(parse_mesh(mesh), config)
        arrange_cpu_devices(spec.num_devices)
        text = load_text(model_folder(config))
        self._events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self._seeds, self._numbers = random.Random(config.seed), itertools.count()
        self._cluster = Cluster(spec, report or SilentReport(), self._events.put)
        self._cluster.start()
        vocab_size, max_model_len = self._cluster.vocab_size, self._cluster.max_model_len
        self._model = load_model(model, vocab_size, max_model_len, self._cluster.folder, text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the devices back."""
        self._cluster.stop()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        session: str = "",
        tenant: str = "",
        priority: int = 0,
    ) -> list[Output]:
        """The outputs of all prompts, in their order (with n > 1, the n of a prompt one after the other).

        ``prompts`` are texts or lists of token ids, ``params`` one for all or one each; ``session``, ``tenant`` and
        ``priority`` are those of all. Raises InvalidRequest before anything is run, or Unavailable if the engine has
        failed.
        """
        standing = {"session": session, "tenant": tenant, "priority": priority}
        generations = self._prepare([prompts] if isinstance(prompts, str) else prompts, params, standing)
        owners = {id: generation for generation in generations for id in generation.ids}
        messages: dict[str, list[Message]] = {generation.request_id: [] for generation in generations}
        todo = [generation.begin() for generation in reversed(generations)]  # a stack; the first is on top
        running: set[str] = set()
        try:
            while todo or running:
                self._submit(todo, running)
                events = self._next_events()
                for id, own in itertools.groupby(events, key=lambda event: event.request_id):
                    generation = owners.get(id)
                    if generation is None:
                        continue  # of an earlier call that was interrupted
                    batch = list(own)
                    turn = generation.take(batch)
                    messages[generation.request_id] += turn.messages
                    running -= {event.request_id for event in batch if event.finish is not None}
                    todo += turn.submit
                    for matched in turn.abort:
                        self._cluster.abort(matched, FinishReason.STOP)
        finally:
            for id in running:
                self._cluster.abort(id)
        return [output for generation in generations for output in fold(messages[generation.request_id])]

    def _prepare(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        standing: dict[str, Any],
    ) -> list[Generation]:
        """A generation per prompt, each checked."""
        if not isinstance(prompts, Sequence) or any(isinstance(prompt, int) for prompt in prompts):
            raise InvalidRequest("prompts must be a text, a list of texts, or a list of lists of token ids")
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise InvalidRequest(f"{len(prompts)} prompts, but {len(each)} params; give one for all, or one each")
        generations = []
        for prompt, own in zip(prompts, each, strict=True):
            if not isinstance(own, SamplingParams):
                raise InvalidRequest(f"params must be SamplingParams, not {type(own).__name__}")
            if not isinstance(prompt, str) and not all(isinstance(token, int) for token in prompt):
                raise InvalidRequest("a prompt must be a text or a list of token ids")
            if isinstance(prompt, str) and not prompt:
                raise InvalidRequest("the prompt is empty; give some text")
            tokens = self._model.encode_text(prompt) if isinstance(prompt, str) else tuple(prompt)
            name, seed = f"llm-{next(self._numbers)}", self._seeds.getrandbits(63)
            arrival = time.monotonic()
            generations.append(Generation(self._model, name, tokens, own, seed, arrival=arrival, **standing))
        return generations

    def _submit(self, todo: list[Request], running: set[str]) -> None:
        """Submit from the top of the stack until the engine's queue is full."""
        while todo:
            try:
                self._cluster.submit(todo[-1])
            except Overloaded:
                if not running:
                    raise
                return
            running.add(todo.pop().id)

    def _next_events(self) -> list[Event]:
        """Wait for a step's events, and take whatever else has piled up."""
        while True:
            try:
                events = self._events.get(timeout=1.0)
                break
            except queue.Empty:
                # A dying engine ends every request with an event; this is for a bug in doing so.
                if self._cluster.failure is not None:
                    raise Unavailable(f"the engine has failed: {self._cluster.failure}") from self._cluster.failure
        while not self._events.empty():
            events = events + self._events.get()
        return events
