"""Hooks that refuse a request in the HTTP server's process, before the scheduler can fail on it.

Each request is checked by the bounds of `request_limits`, then encoded and decoded as on its way to the
scheduler: a field of a wrong type would raise there, in a loop that serves all requests.
"""

from __future__ import annotations

import copy
import functools
import logging
import pkgutil
import re
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from memserve.engine import request_limits as limits
from memserve.engine import request_seams as seams
from memserve.engine.sglang_internals import PARALLEL_STATE

logger = logging.getLogger(__name__)

_MALFORMED = (
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    ArithmeticError,
    RecursionError,
    AssertionError,
)
"""What SGLang's own parsing raises for values of a wrong type or size, and answers with 500."""


@functools.cache
def place() -> None:
    """Register the hooks, in a process that serves HTTP. Idempotent."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(seams.NORMALIZE, normalize, HookType.AROUND)
    HookRegistry.register(seams.INITIAL_STATE, keep_state, HookType.AROUND)
    HookRegistry.register(seams.TOKENIZE, tokenize, HookType.AROUND)
    HookRegistry.register(seams.TOKENIZE_BATCH, tokenize, HookType.AROUND)
    HookRegistry.register(seams.CREATE_REQUEST, create_request, HookType.AROUND)


def normalize(original: Callable[..., Any], body: Any) -> Any:
    """Refuse a body that SGLang cannot normalize, or would copy for too many samples."""
    try:
        limits.check_samples(body.sampling_params)
        return original(body)
    except _MALFORMED as error:
        raise refusal(error) from error


def keep_state(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Refuse a request whose rid is no name."""
    try:
        return original(*args, **kwargs)
    except _MALFORMED as error:
        raise refusal(error) from error


async def tokenize(original: Callable[..., Coroutine[Any, Any, Any]], *args: Any, **kwargs: Any) -> Any:
    """Refuse a request, or a batch, that SGLang cannot tokenize."""
    try:
        return await original(*args, **kwargs)
    except _MALFORMED as error:
        raise refusal(error) from error


def create_request(original: Callable[..., Any], manager: Any, body: Any, *args: Any, **kwargs: Any) -> Any:
    """Create the request for the scheduler, or raise ValueError if the scheduler could not process it."""
    try:
        request = original(manager, body, *args, **kwargs)
        if hasattr(request, "bootstrap_room"):
            config = manager.model_config
            ranks = max(1, pkgutil.resolve_name(PARALLEL_STATE)().num_dp_ranks)
            limits.check_sampling(request.sampling_params, config.vocab_size)
            limits.check_request(request, config.vocab_size, ranks, config.hidden_size)
            params = request.sampling_params
            params.stop_regex_max_len = min(params.stop_regex_max_len, limits.LIMITS.max_stop_regex_tokens)
        check_wire(request)
        return request
    except (*_MALFORMED, re.error, msgspec.MsgspecError) as error:
        raise refusal(error) from error


def check_wire(request: Any) -> None:
    """Encode and decode the request as its way to the scheduler does, without its prompt.

    Raises what SGLang's codec raises for a field of a wrong type or size.
    """
    sent = copy.copy(request)
    sent.input_text = sent.input_ids = sent.mm_inputs = sent.time_stats = sent.input_embeds = None
    encode, decode = pkgutil.resolve_name(seams.ENCODE), pkgutil.resolve_name(seams.DECODE)
    decode(encode(sent))


def refusal(error: Exception) -> ValueError:
    """The error that SGLang answers with 400."""
    logger.debug("refused a request", exc_info=error)
    return ValueError(f"invalid request: {type(error).__name__}: {error}"[:300])
