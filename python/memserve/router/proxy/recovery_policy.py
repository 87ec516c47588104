"""Whether a stream that broke is continued by another server, and from where. Pure.

    greedy, or the servers are deterministic ── why_not ──> None
        nothing that looks back, and the ids are known    prompt + the tokens that were streamed
        anything else                                     the same again; what repeats is left out

/generate tells the ids in its stream; those of an OpenAI stream have to be proven (see `proof`).

Both give the text of an undisturbed run, as far as servers compute alike; what they say twice has to be
the same. The second costs the decoding of what was streamed, once more.

A request looks back if what comes next depends on what was generated other than as a part of the
prompt would: penalties, grammars, parsers of reasoning and tools. Stop strings are kept out of the cut:
so much of the text is generated again that none can begin before it and end after it.

Seeds: SGLang 0.5.23 draws a token from (seed, position) with --enable-deterministic-inference, and with
it only (sampling_batch_info.py); otherwise a seed is not even looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from memserve.router.proxy.stream_splicer import AcceptedPrefix, NativeSplicer, OpenAiSplicer, StreamSplicer
from memserve.router.proxy.stream_state import TEXT, Path, Received, Unreadable
from memserve.router.request import Api, GenerationRequest, JsonObject
from memserve.router.sse import DONE

TextOf = Callable[[Sequence[int]], str]
"""The text that generated tokens add to the prompt, by the model's tokenizer; "" if nobody can tell."""

SAMPLES = "it is sampled: only greedy requests (temperature 0) can be, or all with deterministic servers"

MAX_STEPS_BACK = 256
"""How many tokens are generated again, at most, for the sake of a stop string or half a character."""
_GREEDY = 1e-6
"""SGLang takes a lower temperature for 0."""
_HALF = "�"

# What a request may contain, beside what is false or null, and still not look back.
_PLAIN_SAMPLING = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "min_new_tokens", "stop", "n"),
        *("stop_token_ids", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens"),
        *("no_stop_trim", "sampling_seed", "stream_interval", "logit_bias"),
    }
)
_NEUTRAL = {"repetition_penalty": 1}
_PLAIN_NATIVE = frozenset(
    {"text", "input_ids", "sampling_params", "stream", "rid", "extra_key", "cache_salt", "priority", "user"}
)
_PLAIN_OPENAI = frozenset(
    {
        *("model", "messages", "prompt", "input_ids", "stream", "stream_options", "rid", "n", "user"),
        *("max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p"),
        *("seed", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens", "no_stop_trim"),
        *("extra_key", "cache_salt", "priority", "metadata", "store"),
        *("chat_template_kwargs", "separate_reasoning", "stream_reasoning"),
    }
)
_OPENAI_LENGTHS = ("max_tokens", "max_completion_tokens", "min_tokens")
_NATIVE_LENGTHS = ("max_new_tokens", "min_new_tokens")
# What has a state at the servers, or answers with more than text.
_NEVER = (
    *("session_id", "session_params", "return_hidden_states", "return_routed_experts"),
    *("return_sampling_mask", "return_indexer_topk", "custom_logit_processor", "use_beam_search"),
)


@dataclass(frozen=True, slots=True)
class Resumption:
    """How a broken stream goes on."""

    call: GenerationRequest
    """What another server is asked."""
    continuation: StreamSplicer
    num_kept: int
    """Generated tokens that have become a part of the prompt; 0: it does all of it again."""
    num_tokens: int | None = None
    """Of that prompt, with them."""


def why_not(call: GenerationRequest, *, is_deterministic: bool) -> str | None:
    """Why a stream of `call` could not be continued; None if it could.

    `is_deterministic`: all servers sample by seed and position.
    """
    for name in _NEVER:
        if call.body.get(name):
            return f"{name} is set"
    for params in _params(call):
        if (params.get("beam_width") or 1) != 1:
            return "beam_width is set"
        if not is_deterministic and not _is_greedy(params):
            return SAMPLES
    return None


def closing(call: GenerationRequest, seen: Received) -> bytes | None:
    """What is left to say to a client that has the whole answer; None if it has not."""
    if seen.is_done:
        return b""
    count = (call.num_prompts or 1) * call.num_samples
    if len(seen.choices) < count or not all(one.is_finished for one in seen.choices.values()):
        return None
    options: Any = call.body.get("stream_options") or {}
    is_told = call.api is Api.GENERATE or seen.has_usage or not options.get("include_usage")
    return DONE if is_told else None


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is known of the tokens of a call with one prompt."""

    prompt: Sequence[int] = ()
    """Of the prompt; none if they are not known."""
    text_of: TextOf = lambda _: ""
    room: int | None = None
    """How long the prompt may be at the servers, if there is a limit."""
    proven: Sequence[int] = ()
    """Those at the begin of an OpenAI answer."""


def openai_text(call: GenerationRequest, seen: Received) -> str | None:
    """What was streamed of an OpenAI answer, if it helps to know its tokens; else None."""
    if call.api is Api.GENERATE or call.num_prompts is not None or call.num_samples != 1:
        return None
    if _looks_back(call.body, _PLAIN_OPENAI) or list(seen.choices) != [0]:
        return None
    # The native default is 16 new tokens, but a chat goes on to the end of the context.
    if call.api is Api.COMPLETIONS and not isinstance(call.body.get("max_tokens"), int):
        return None
    parts = seen.choices[0].parts
    return parts[_field(call)] if list(parts) == [_field(call)] else None


def resumption(call: GenerationRequest, seen: Received, tokens: Tokens) -> Resumption:
    """How a stream of `call`, of which `why_not` knows nothing bad, goes on after `seen`.

    `seen` is left as it is. Raises Unreadable.
    """
    if seen.is_incremental and call.body.get("return_logprob"):
        raise Unreadable("it tells logprobs in parts")
    seen = copy.deepcopy(seen)
    kept = _kept(call, seen, tokens)
    count = len(kept.ids)
    if call.api is Api.GENERATE:
        continuation: StreamSplicer = NativeSplicer(seen, kept)
    else:
        continuation = OpenAiSplicer(seen, kept, _field(call), _stops(call.body))
    if count:
        call = _continued(call, [*tokens.prompt, *kept.ids], count)
    return Resumption(call, continuation, count, len(tokens.prompt) + count)


def _kept(call: GenerationRequest, seen: Received, tokens: Tokens) -> AcceptedPrefix:
    """What can stand in the prompt of what was streamed."""
    if not tokens.prompt:
        return AcceptedPrefix()
    ids: Sequence[int] = tokens.proven
    text, params = openai_text(call, seen), call.body
    if call.api is Api.GENERATE and _is_plain(call, seen):
        choice = seen.choices[0]
        ids, text, params = choice.ids, choice.parts.get(TEXT, ""), call.body["sampling_params"]  # type: ignore[assignment]
    if text is None:
        return AcceptedPrefix()
    if tokens.room is not None:
        ids = ids[: max(0, tokens.room - len(tokens.prompt))]
    return keep(ids, text, _stops(params), tokens.text_of)


def keep(ids: Sequence[int], text: str, stops: Sequence[str], text_of: TextOf) -> AcceptedPrefix:
    """The longest part of what was generated that can stand in the prompt.

    Its text has to be known, to be whole, and to leave out the length of the longest stop string less one:
    one that begins in it would have ended what was streamed.
    """
    longest = len(text) - max((len(stop) - 1 for stop in stops), default=0)
    for count in range(len(ids), max(0, len(ids) - MAX_STEPS_BACK), -1):
        kept = text_of(ids[:count])
        if kept and len(kept) <= longest and not kept.endswith(_HALF) and text.startswith(kept):
            return AcceptedPrefix(tuple(ids[:count]), kept)
    return AcceptedPrefix()


def _continued(call: GenerationRequest, prompt: list[int], count: int) -> GenerationRequest:
    """`call` from `prompt`, the last `count` of whose tokens were generated."""
    body = {name: value for name, value in call.body.items() if name != "text"}
    if call.api is Api.GENERATE:
        params: Any = body["sampling_params"]
        body["sampling_params"] = {**params, **_left(params, _NATIVE_LENGTHS, count)}
    else:
        body |= _left(body, _OPENAI_LENGTHS, count)
    body["prompt" if call.api is Api.COMPLETIONS else "input_ids"] = prompt
    return structs.replace(call, body=body)


def _left(params: JsonObject, names: Sequence[str], count: int) -> JsonObject:
    """The lengths in `params` that are left after `count` tokens."""
    values = {name: params.get(name) for name in names}
    return {name: max(0, value - count) for name, value in values.items() if isinstance(value, int)}


def _is_plain(call: GenerationRequest, seen: Received) -> bool:
    """Whether a /generate call has one prompt and does not look back."""
    params = call.body.get("sampling_params")
    if not isinstance(params, dict) or call.num_prompts is not None or call.num_samples != 1:
        return False
    if (
        list(seen.choices) != [0]
        or seen.is_incremental is None
        or seen.choices[0].meta.get("reasoning_tokens")
    ):
        return False
    # A server may have a default of its own for what is not given.
    if not isinstance(params.get("max_new_tokens"), int):
        return False
    return not _looks_back(call.body, _PLAIN_NATIVE) and not _looks_back(params, _PLAIN_SAMPLING)


def _looks_back(fields: JsonObject, plain: frozenset[str]) -> bool:
    """Whether there is anything in `fields` that is not known to be `plain`."""
    return any(value and name not in plain and _NEUTRAL.get(name) != value for name, value in fields.items())


def _field(call: GenerationRequest) -> Path:
    """Where the text of an OpenAI answer stands."""
    return ("text",) if call.api is Api.COMPLETIONS else ("content",)


def _params(call: GenerationRequest) -> list[JsonObject]:
    """The sampling parameters of each prompt."""
    if call.api is not Api.GENERATE:
        return [call.body]
    params = call.body.get("sampling_params") or {}
    return list(params) if isinstance(params, list) else [params]  # type: ignore[list-item]


def _is_greedy(params: JsonObject) -> bool:
    temperature = params.get("temperature")
    return params.get("top_k") == 1 or (isinstance(temperature, int | float) and temperature < _GREEDY)


def _stops(params: JsonObject) -> list[str]:
    stop = params.get("stop") or []
    return [stop] if isinstance(stop, str) else [one for one in stop if isinstance(one, str)]  # type: ignore[attr-defined]
