"""Decides whether a broken stream is continued by another server, and from where. Pure.

    greedy, or deterministic servers ── not_resumable ──> None
        /generate, and the next token depends on the tokens alone     prompt + the streamed tokens
        anything else                                                 the same request; repeats are dropped

Both give the text of an undisturbed run, as far as servers compute alike; repeated parts have to be equal.
The second costs decoding the streamed part once more. OpenAI's streams tell no token ids.

The next token depends on more than the tokens where a request has penalties, grammars, or parsers of
reasoning and tools. Stop strings are kept out of the accepted tokens: so much of the text is generated
again that no stop string can begin before the cut and end after it.

Seeds: SGLang 0.5.23 draws a token from (seed, position) with --enable-deterministic-inference only
(sampling_batch_info.py); otherwise it ignores the seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from memserve.router.proxy.stream_splicer import (
    TEXT,
    AcceptedPrefix,
    NativeSplicer,
    OpenAiSplicer,
    Received,
    StreamSplicer,
    Unreadable,
)
from memserve.router.request import Api, GenerationRequest, JsonObject
from memserve.router.sglang_api import FIELDS, NEVER_RESUMED, RESUMED_FROM_TOKENS, In
from memserve.router.sse import DONE

Detokenize = Callable[[Sequence[int]], str]
"""The text that generated tokens add to the prompt, by the model's tokenizer; "" if it is not known."""

SAMPLES = "it is sampled: only greedy requests (temperature 0) can be, or all with deterministic servers"

_GREEDY = 1e-6
"""SGLang takes a lower temperature for 0."""
_HALF = "�"

_LENGTHS = ("max_new_tokens", "min_new_tokens")


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """What is known of the tokens of a request with one prompt."""

    ids: Sequence[int] = ()
    """The prompt's token ids; empty if they are not known."""
    detokenize: Detokenize = lambda _: ""
    max_tokens: int | None = None
    """The longest prompt that the servers take, if there is a limit."""


@dataclass(frozen=True, slots=True)
class Resumption:
    """The plan for continuing a broken stream."""

    request: GenerationRequest
    """For the next server."""
    splicer: StreamSplicer
    num_accepted: int
    """Generated tokens that became a part of the prompt; 0: the answer is generated from its beginning."""
    num_tokens: int | None = None
    """Length of the prompt with the accepted tokens."""


def not_resumable(request: GenerationRequest, *, is_deterministic: bool) -> str | None:
    """Why a stream of `request` could not be continued; None if it could.

    `is_deterministic`: all servers sample by seed and position.
    """
    for fields in (request.body, *request.sampling):
        for name in NEVER_RESUMED & fields.keys():
            if _is_set(name, fields[name]):
                return f"{name} is set"
    if is_deterministic or all(map(_is_greedy, request.sampling)):
        return None
    return SAMPLES


def closing_events(request: GenerationRequest, received: Received) -> bytes | None:
    """The events that a client lacks which has the whole answer; None if it has not."""
    if received.is_done:
        return b""
    count = (request.num_prompts or 1) * request.num_samples
    if len(received.choices) < count or not all(one.is_finished for one in received.choices.values()):
        return None
    options: Any = request.body.get("stream_options") or {}
    has_usage = request.api is Api.GENERATE or received.has_usage or not options.get("include_usage")
    return DONE if has_usage else None


def plan_resumption(request: GenerationRequest, received: Received, tokens: PromptTokens) -> Resumption:
    """How a stream of `request`, which is resumable, continues after `received`.

    `received` is left as it is. Raises Unreadable.
    """
    if received.is_incremental and request.body.get("return_logprob"):
        raise Unreadable("it tells logprobs in parts")
    received = copy.deepcopy(received)
    if request.api is not Api.GENERATE:
        return Resumption(request, OpenAiSplicer(received, _stops(request.body)), 0)
    accepted = _accepted(request, received, tokens)
    count = len(accepted.ids)
    if count:
        request = _continued(request, [*tokens.ids, *accepted.ids], count)
    return Resumption(request, NativeSplicer(received, accepted), count, len(tokens.ids) + count)


def accepted_prefix(
    ids: Sequence[int],
    text: str,
    stops: Sequence[str],
    detokenize: Detokenize,
    max_steps_back: int = 256,
) -> AcceptedPrefix:
    """The longest part of the generated tokens that can stand in the prompt.

    Its text has to be known, to be whole, and to leave out the length of the longest stop string less one:
    a stop string that begins in it would have ended the stream. At most `max_steps_back` tokens are left
    out, and generated again, for the sake of a stop string or half a character.
    """
    longest = len(text) - max((len(stop) - 1 for stop in stops), default=0)
    for count in range(len(ids), max(0, len(ids) - max_steps_back), -1):
        part = detokenize(ids[:count])
        if part and len(part) <= longest and not part.endswith(_HALF) and text.startswith(part):
            return AcceptedPrefix(tuple(ids[:count]), part)
    return AcceptedPrefix()


def _accepted(request: GenerationRequest, received: Received, tokens: PromptTokens) -> AcceptedPrefix:
    """The streamed tokens of /generate that can stand in the prompt."""
    params: Any = request.body.get("sampling_params")
    if not tokens.ids or not _depends_on_tokens_alone(request, params, received):
        return AcceptedPrefix()
    choice = received.choices[0]
    ids: Sequence[int] = choice.ids
    if tokens.max_tokens is not None:
        ids = ids[: max(0, tokens.max_tokens - len(tokens.ids))]
    return accepted_prefix(ids, choice.parts.get(TEXT, ""), _stops(params), tokens.detokenize)


def _depends_on_tokens_alone(request: GenerationRequest, params: object, received: Received) -> bool:
    """Whether the generated tokens can stand in the prompt (one prompt only)."""
    if not isinstance(params, dict) or request.num_prompts is not None or request.num_samples != 1:
        return False
    if list(received.choices) != [0] or received.is_incremental is None:
        return False
    # A server may have a default of its own for a length that is not given.
    if received.choices[0].meta.get("reasoning_tokens") or not isinstance(params.get("max_new_tokens"), int):
        return False
    return not any(
        name not in RESUMED_FROM_TOKENS[where] and _is_set(name, value)
        for where, fields in ((In.NATIVE, request.body), (In.SAMPLING, params))
        for name, value in fields.items()
    )


def _is_set(name: str, value: object) -> bool:
    field = FIELDS.get(name)
    return bool(value) and (field is None or field.neutral != value)


def _continued(request: GenerationRequest, prompt: list[int], count: int) -> GenerationRequest:
    """`request` from `prompt`, the last `count` of whose tokens were generated."""
    body = {name: value for name, value in request.body.items() if name != "text"}
    params: Any = body["sampling_params"]
    lengths = {name: params.get(name) for name in _LENGTHS}
    left = {name: max(0, value - count) for name, value in lengths.items() if isinstance(value, int)}
    return structs.replace(request, body={**body, "input_ids": prompt, "sampling_params": {**params, **left}})


def _is_greedy(params: JsonObject) -> bool:
    temperature = params.get("temperature")
    return params.get("top_k") == 1 or (isinstance(temperature, int | float) and temperature < _GREEDY)


def _stops(params: JsonObject) -> list[str]:
    stop = params.get("stop") or []
    return [stop] if isinstance(stop, str) else [one for one in stop if isinstance(one, str)]  # type: ignore[attr-defined]
