"""What no instance could do is refused before any sees it."""

from jmemserve.errors import InvalidRequest
from jmemserve.types import MAX_STOP_IDS, Request, check_standing


def check_request(request: Request, vocabulary: int, max_model_len: int) -> None:
    """Raise InvalidRequest, with what to change, for a request that can never work. Lengths in tokens."""
    request.params.check()
    check_standing(request.session, request.tenant, request.priority, request.salt)
    if not request.prompt:
        raise InvalidRequest("the prompt is empty; give at least one token")
    if (bad := next((t for t in request.prompt if not 0 <= t < vocabulary), None)) is not None:
        raise InvalidRequest(f"token id {bad} is outside the model's vocabulary, 0 to {vocabulary - 1}")
    if len(request.prompt) >= max_model_len:
        raise InvalidRequest(
            f"the prompt has {len(request.prompt)} tokens, but at most {max_model_len - 1} leave room for an "
            f"answer (the server's --max-model-len is {max_model_len}); shorten it"
        )
    if len(request.stop_ids) > MAX_STOP_IDS:
        raise InvalidRequest(
            f"at most {MAX_STOP_IDS} stop token ids, with the model's own, not {len(request.stop_ids)}"
        )
    if (bad := next((t for t in request.stop_ids if not 0 <= t < vocabulary), None)) is not None:
        raise InvalidRequest(f"stop token id {bad} is outside the model's vocabulary, 0 to {vocabulary - 1}")
