"""Splits requests with `n > 1`, which would hang on a pair of SGLang servers.

A /generate request becomes a batch that repeats its prompts; its answer has the shape of `n > 1`. A request
to OpenAI's endpoints becomes n requests, whose answers are joined. Pure but for `SampleJoiner`'s state.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from memserve.core.errors import BadRequest
from memserve.router.request import GenerationRequest, JsonObject, decode_json, encode_json, part_names
from memserve.router.sglang_api import In, fields_of
from memserve.router.sse import DONE, EventSplitter, data_of, with_data

_PER_PROMPT = [(name, field.is_prompt) for name, field in fields_of(In.NATIVE) if field.is_per_prompt]


def as_batch(request: GenerationRequest) -> GenerationRequest:
    """A /generate request with n samples as a batch of n × its prompts, a prompt's samples side by side.

    Source: SGLang, TokenizerManager._handle_batch_request, which orders `n > 1` the same way.
    """
    n, body = request.num_samples, dict(request.body)
    for name, is_prompt in _PER_PROMPT:
        value = body.get(name)
        if value is None:
            continue
        if request.num_prompts is None and is_prompt:
            body[name] = [value] * n
        elif isinstance(value, list) and request.num_prompts is not None:
            if len(value) != request.num_prompts:
                raise BadRequest(
                    f"{name} has {len(value)} entries for {request.num_prompts} prompts", field=name
                )
            body[name] = [one for one in value for _ in range(n)]
    params = body["sampling_params"]
    if isinstance(params, list):
        body["sampling_params"] = [{**one, "n": 1} for one in params for _ in range(n)]
    elif isinstance(params, dict):
        body["sampling_params"] = {**params, "n": 1}
    count = n * (request.num_prompts or 1)
    rids = part_names(request.rid, count)
    return structs.replace(request, body=body, rids=rids, num_prompts=count, num_samples=1)


def as_singles(request: GenerationRequest) -> list[GenerationRequest]:
    """An OpenAI request with n samples as n calls for one each.

    The seed is increased by one per sample: sample 0 is the answer of a request without n.
    """
    return [_single(request, sample) for sample in range(request.num_samples)]


def _single(request: GenerationRequest, sample: int) -> GenerationRequest:
    rid = part_names(request.rid, request.num_samples)[sample]
    body: JsonObject = {**request.body, "n": 1}
    if isinstance(seed := body.get("seed"), int):
        body["seed"] = seed + sample
    rids = (rid,) if request.num_prompts is None else part_names(rid, request.num_prompts)
    return structs.replace(request, body=body, rid=rid, rids=rids, num_samples=1)


def join_answers(request: GenerationRequest, answers: Sequence[bytes]) -> bytes:
    """The n whole answers as one: choices in SGLang's order; the usage counts the prompt once."""
    parsed = [decode_json(answer) for answer in answers]
    choices = [
        {**choice, "index": choice["index"] * request.num_samples + sample}
        for sample, answer in enumerate(parsed)
        for choice in answer["choices"]
    ]
    choices.sort(key=lambda choice: choice["index"])
    usage = _sum_usage([answer.get("usage") for answer in parsed])
    return encode_json({**parsed[0], "id": request.rid, "choices": choices, "usage": usage})


class SampleJoiner:
    """Joins n event streams into one, event by event, in their order of arrival."""

    def __init__(self, request: GenerationRequest) -> None:
        self._call = request
        self._splitters = [EventSplitter() for _ in range(request.num_samples)]
        self._usages: list[object] = [None] * request.num_samples
        self._usage_event = b""

    def feed(self, sample: int, chunk: bytes) -> bytes:
        """The events for the client that `chunk` of sample number `sample` completes."""
        return b"".join(self._joined(sample, event) for event in self._splitters[sample].feed(chunk))

    def end(self) -> bytes:
        """The last events, after all streams: the usage, if it was asked for, and [DONE]."""
        if not self._usage_event:
            return DONE
        last = {**decode_json(data_of(self._usage_event)), "id": self._call.rid}
        last["usage"] = _sum_usage(self._usages)
        return with_data(self._usage_event, encode_json(last)) + DONE

    def _joined(self, sample: int, event: bytes) -> bytes:
        data = data_of(event)
        if not data.startswith(b"{"):
            return b""  # [DONE], and comments of one sample
        parsed = decode_json(data)
        if "error" in parsed:
            return event
        if not parsed.get("choices") and parsed.get("usage"):
            self._usages[sample], self._usage_event = parsed["usage"], event
            return b""
        for choice in parsed.get("choices") or ():
            choice["index"] = choice["index"] * self._call.num_samples + sample
        parsed["id"] = self._call.rid
        return with_data(event, encode_json(parsed))


def _sum_usage(usages: Sequence[object]) -> JsonObject | None:
    present = [usage for usage in usages if isinstance(usage, dict)]
    if not present:
        return None
    total: JsonObject = dict(present[0])
    for name in ("completion_tokens", "reasoning_tokens"):
        if isinstance(total.get(name), int):
            total[name] = sum(usage.get(name) or 0 for usage in present)
    total["total_tokens"] = present[0].get("prompt_tokens", 0) + sum(
        usage.get("completion_tokens") or 0 for usage in present
    )
    return total
