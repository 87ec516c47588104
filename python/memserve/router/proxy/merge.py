"""The bodies for the two legs of a pair, and their answers merged into one. Pure functions of JSON.

Prefill computes the prompt and one token. Decode's answer is the client's answer, but only prefill knows
the prompt's logprobs, the first token's logprobs of given ids, and its cached tokens. What prefill does not
tell either is refused.
Source: SGLang 0.5.23, disaggregation/decode.py (_commit_transfer_to_req), which has the rest from prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memserve.core.errors import BadRequest
from memserve.router.cluster.instance import Pair
from memserve.router.request import Api, GenerationRequest, JsonObject, decode_json, encode_json
from memserve.router.sse import data_of, with_data

_LOGPROB_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def leg_bodies(request: GenerationRequest, pair: Pair, draw_room: Callable[[], int]) -> tuple[bytes, bytes]:
    """The bodies for prefill and for decode.

    `draw_room` gives a new rendezvous number for each prompt. Prefill does not stream its single token,
    even if the client wants a stream. Raises BadRequest for what servers like these return, and a pair
    cannot; the servers refuse, or ignore, what they do not return.
    """
    returned = pair.prefill.server_info.returned
    for name in filter(returned.__contains__, request.wanted_of_one_server):
        raise BadRequest(
            f"{name} needs a colocated server, and none is ready: a prefill and a decode server lose the "
            "prompt's part of it",
            field=name,
        )
    host, port = pair.prefill.bootstrap_host, pair.prefill.bootstrap_port
    body: JsonObject = {**request.body, "rid": rid_field(request)}
    if request.num_prompts is None:
        body |= {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": draw_room()}
    else:
        rooms = [draw_room() for _ in range(request.num_prompts)]
        count = len(rooms)
        body |= {"bootstrap_host": [host] * count, "bootstrap_port": [port] * count, "bootstrap_room": rooms}
    decode = encode_json(body)
    if not request.is_stream:
        return decode, decode
    prefill = {**body, "stream": False}
    prefill.pop("stream_options", None)
    return encode_json(prefill), decode


def rid_field(request: GenerationRequest) -> object:
    """The value of SGLang's `rid`: a list for a batch."""
    return request.rid if request.num_prompts is None else list(request.rids)


def merge_answers(request: GenerationRequest, prefill: Any, decode: bytes) -> bytes:
    """Decode's whole answer with the prompt's fields of prefill's answer, which is parsed."""
    theirs, ours = prefill, decode_json(decode)
    if request.api is Api.GENERATE:
        pairs = [(theirs, ours)] if isinstance(ours, dict) else list(zip(theirs, ours, strict=True))
        for one, other in pairs:
            _merge_meta(one["meta_info"], other["meta_info"])
            for name in ("cached_tokens", "e2e_latency"):
                other["meta_info"][f"prefill_{name}"] = one["meta_info"].get(name)
        return encode_json(ours)
    if request.wants_input_logprobs:
        for one, other in zip(theirs["choices"], ours["choices"], strict=True):
            _prepend_logprobs(one, other)
    cached = cached_tokens_in(request, theirs)
    if cached is not None and isinstance(ours.get("usage"), dict):
        details = ours["usage"].get("prompt_tokens_details") or {}
        ours["usage"]["prompt_tokens_details"] = {**details, "prefill_cached_tokens": cached}
    return encode_json(ours)


def cached_tokens_in(request: GenerationRequest, answer: Any) -> int | list[int] | None:
    """The cached prompt tokens that a parsed answer reports, for each prompt of a native batch.

    None if it reports none: OpenAI's endpoints do so only with --enable-cache-report.
    """
    if request.api is Api.GENERATE:
        if isinstance(answer, list):
            return [one["meta_info"].get("cached_tokens") for one in answer]
        cached: int | None = answer["meta_info"].get("cached_tokens")
        return cached
    details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    total: int | None = details.get("cached_tokens")
    return total


def cache_report(request: GenerationRequest, answer: Any) -> JsonObject:
    """Prefill's reused tokens; for a single prompt also by tier: `device` is HBM, `host` DRAM."""
    report: JsonObject = {"prefill_cached_tokens": cached_tokens_in(request, answer)}
    if isinstance(answer, dict) and (tiers := answer.get("meta_info", {}).get("cached_tokens_details")):
        report["prefill_cached_tokens_details"] = tiers
    return report


class LogprobMerger:
    """Adds prefill's logprobs to the events of decode's stream."""

    def __init__(self, request: GenerationRequest, prefill: Any) -> None:
        """`prefill` is prefill's parsed answer."""
        self._api = request.api
        self._prefill = prefill
        self._seen: set[int] = set()

    def rewrite(self, event: bytes) -> bytes:
        """The event for the client in place of decode's `event`."""
        data = data_of(event)
        if not data.startswith(b"{"):
            return event
        ours = decode_json(data)
        if self._api is Api.GENERATE and "meta_info" in ours:
            batch = isinstance(self._prefill, list)
            theirs = self._prefill[ours.get("index", 0)] if batch else self._prefill
            _merge_meta(theirs["meta_info"], ours["meta_info"])
        for choice in ours.get("choices") or ():
            # The prompt's logprobs belong to the first event of each choice.
            if choice["index"] not in self._seen:
                self._seen.add(choice["index"])
                _prepend_logprobs(self._prefill["choices"][choice["index"]], choice)
        return with_data(event, encode_json(ours))


def _merge_meta(prefill: JsonObject, decode: JsonObject) -> None:
    """Copy the prompt's fields, whose names begin with `input_`, and what decode lacks of the first token."""
    decode.update({key: value for key, value in prefill.items() if key.startswith("input_")})
    theirs: Any = prefill.get("output_token_ids_logprobs")
    ours: Any = decode.get("output_token_ids_logprobs")
    count = decode.get("completion_tokens")
    # A later event of a stream may hold the newest tokens alone: fewer rows than tokens.
    if theirs and ours and ours[0] is None and (not isinstance(count, int) or len(ours) >= count):
        ours[0] = theirs[0]
    if count == 0 and decode.get("output_token_logprobs"):  # of the token that prefill always computes
        decode["output_token_logprobs"], decode["output_token_logprobs_length"] = [], 0


def _prepend_logprobs(prefill: JsonObject, decode: JsonObject) -> None:
    """OpenAI's logprobs are lists over prompt and output; prefill's lists end with its one output token."""
    theirs, ours = prefill.get("logprobs"), decode.get("logprobs")
    if not isinstance(theirs, dict):
        return
    if not isinstance(ours, dict):
        ours = decode["logprobs"] = {}
    for name in _LOGPROB_LISTS:
        if isinstance(theirs.get(name), list):
            ours[name] = [*theirs[name][:-1], *(ours.get(name) or [])]
