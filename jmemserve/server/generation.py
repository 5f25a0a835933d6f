"""One Generate call: from a prompt to n requests, and from their events to messages. Pure: no clock, no task.

    begin() -> request 0 -> engine
    engine -> events -> take() -> Turn: messages for the caller, requests to submit, requests to abort
                           |
                           +-- on the first token of output 0: requests 1 .. n-1 (the prompt is cached by then)

Both drivers, the asyncio front-end and the offline LLM, do what each Turn says and nothing else.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable

from jmemserve.errors import JmemserveError, WorldError
from jmemserve.server.detokenize import Detokenizer, StopMatcher
from jmemserve.server.messages import Delta, Finished, Message
from jmemserve.server.model import Model
from jmemserve.types import Event, FinishReason, Request, SamplingParams, TokenLogprobs, check_standing

_NATURAL = (FinishReason.STOP, FinishReason.LENGTH)


class EngineError(JmemserveError):
    """The engine gave up on a request that it had accepted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """What follows from some events."""

    messages: tuple[Message, ...] = ()  # for the caller, in order
    submit: tuple[Request, ...] = ()  # for the engine, now
    abort: tuple[str, ...] = ()  # ids that met a stop string: abort them as STOP; a final event still follows


class Generation:
    """The outputs of one call. The caller's messages for an index are deltas and then exactly one Finished."""

    def __init__(
        self,
        model: Model,
        request_id: str,
        prompt: tuple[int, ...],
        params: SamplingParams,
        seed: int,
        salt: str = "",
        arrival: float = 0.0,
        deadline: float | None = None,
        *,
        session: str = "",
        tenant: str = "",
        priority: int = 0,
    ):
        """``seed`` is used if ``params`` names none. Raises InvalidRequest if the model cannot do it."""
        check_standing(session, tenant, priority, salt)
        model.check_params(params)
        model.check_prompt(prompt)
        self.request_id = request_id
        self.deadline = deadline
        base = seed if params.seed is None else params.seed
        ids = [request_id] if params.n == 1 else [f"{request_id}:{index}" for index in range(params.n)]
        self._requests = [
            Request(
                id,
                prompt,
                params,
                derive_seed(base, index),
                model.stop_ids(params),
                salt,
                arrival,
                deadline,
                ids[0] if index else "",
                session,
                tenant,
                priority,
            )
            for index, id in enumerate(ids)
        ]
        self._outputs = {id: _Output(model, self._requests[0], request_id, index) for index, id in enumerate(ids)}
        self._waiting = self._requests[1:]  # until output 0 has a token

    @property
    def ids(self) -> list[str]:
        """The engine's ids of all outputs, by index."""
        return [request.id for request in self._requests]

    @property
    def done(self) -> bool:
        """Whether every output has ended."""
        return all(output.done for output in self._outputs.values())

    def begin(self) -> Request:
        """The request to submit first."""
        return self._requests[0]

    def take(self, events: Iterable[Event]) -> Turn:
        """What follows from ``events``, which are this call's, in the order of the engine."""
        news: dict[str, list[Event]] = {}
        for event in events:
            news.setdefault(event.request_id, []).append(event)
        messages: list[Message] = []
        abort: list[str] = []
        for id, own in news.items():
            output = self._outputs[id]
            matched = output.matched
            messages += output.take(own)
            if output.matched and not matched and not output.done:
                abort.append(id)
        submit: list[Request] = []
        first = self._outputs[self._requests[0].id]
        if self._waiting and first.started:
            waiting, self._waiting = self._waiting, []
            if first.finish in (None, *_NATURAL):
                submit = waiting
            else:  # what ended output 0 was not about output 0 alone
                messages += [self._outputs[request.id].end_like(first) for request in waiting]
        return Turn(tuple(messages), tuple(submit), tuple(abort))

    def refuse(self, request: Request, error: JmemserveError) -> Message:
        """The message for a later output that the engine refused."""
        return self._outputs[request.id].fail(error)


class _Output:
    """One output: its text so far, and whether it has ended."""

    def __init__(self, model: Model, request: Request, request_id: str, index: int):
        self._request_id, self._index = request_id, index
        self._min_tokens = request.params.min_tokens
        self._detokenizer: Detokenizer | None = None
        self._matcher = StopMatcher(request.params.stop, request.params.include_stop_str_in_output)
        if model.text is not None:
            decode = functools.partial(model.text.decode, skip_special_tokens=request.params.skip_special_tokens)
            self._detokenizer = Detokenizer(decode, request.prompt)
        self._in_one_go = not request.params.stop and not request.params.min_tokens
        self._num_tokens = 0  # delivered
        self._end: Finished | None = None

    @property
    def done(self) -> bool:
        return self._end is not None

    @property
    def finish(self) -> FinishReason | None:
        return None if self._end is None else self._end.finish

    @property
    def started(self) -> bool:
        return self._num_tokens > 0 or self.done

    @property
    def matched(self) -> bool:
        return self._matcher.matched is not None

    def take(self, events: list[Event]) -> list[Message]:
        """One delta for all of ``events`` together, if there is anything new, and the end if it is among them."""
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        text = ""
        last: Event | None = None
        for event in events:
            if self._in_one_go:  # no token can be the last but for the engine's own reasons
                tokens += event.tokens
                logprobs += event.logprobs
                if event.finish is not None:
                    last = event
                continue
            for place, token in enumerate(event.tokens):
                if self.matched:
                    break  # made before the engine heard of the match
                tokens.append(token)
                logprobs += event.logprobs[place : place + 1]
                text += self._push(token)
            if event.finish is not None:
                last = event
        if self._in_one_go and tokens:
            text = self._push(*tokens)
        if last is not None and not self.matched:
            text += self._flush()
        messages: list[Message] = []
        if tokens or text:
            messages.append(Delta(self._request_id, self._index, tuple(tokens), text, tuple(logprobs)))
        if last is not None:
            messages.append(self._finish(last))
        return messages

    def end_like(self, other: "_Output") -> Finished:
        """End before having begun, for the reason for which ``other`` did."""
        assert other._end is not None, f"output {other._index} has not ended"
        self._end = dataclasses.replace(
            other._end, index=self._index, usage=dataclasses.replace(other._end.usage, completion_tokens=0)
        )
        return self._end

    def fail(self, error: JmemserveError) -> Finished:
        """End without having been accepted."""
        self._end = Finished(self._request_id, self._index, FinishReason.ERROR, error=error)
        return self._end

    def _push(self, *tokens: int) -> str:
        self._num_tokens += len(tokens)
        if self._detokenizer is None:
            return ""
        piece = self._detokenizer.push(*tokens)
        return piece if self._num_tokens <= self._min_tokens else self._matcher.push(piece)

    def _flush(self) -> str:
        piece = "" if self._detokenizer is None else self._detokenizer.flush()
        return self._matcher.push(piece) + self._matcher.flush()

    def _finish(self, last: Event) -> Finished:
        assert last.finish is not None, f"{last.request_id} has not ended"
        finish = FinishReason.STOP if self.matched else last.finish
        error = EngineError(last.error or "the engine failed") if finish is FinishReason.ERROR else None
        usage = dataclasses.replace(last.usage, completion_tokens=self._num_tokens)
        self._end = Finished(self._request_id, self._index, finish, self._matcher.matched, usage, last.timings, error)
        return self._end


def derive_seed(seed: int, index: int) -> int:
    """The seed of output ``index``: ``seed`` itself for the first, unrelated ones for the others."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def is_retryable(error: JmemserveError) -> bool:
    """Whether the same request may succeed on another try."""
    return isinstance(error, (WorldError, EngineError))
