"""The same request to one server and, through a router, to a pair: the answers have to be equal.

Drawn are valid requests whose answer is determined. Fields that tell of time, place and cache are left out.
"""

from __future__ import annotations

import json
import random
from typing import Any

import requests

from memserve.core.errors import BadRequest
from memserve.router.field_kinds import ModelLimits
from memserve.router.proxy.validation import read_request
from memserve.router.request import Api
from memserve.router.sglang_api import In

from .harm import asks_for_much
from .values import CONTEXT, VOCABULARY, Drawn, draw

LIMITS = ModelLimits(VOCABULARY, CONTEXT, has_pairs=True)
UNEQUAL = {"id", "created", "rid", "e2e_latency", "cached_tokens", "cached_tokens_details", "weight_version"}
"""Names of values that differ between two servers, or two runs."""
UNEQUAL |= {"spec_tokens_details"}  # with n > 1 an empty list of one server, absent from a pair's answer
UNEQUAL_ENDINGS = ("_time", "_ts", "_latency", "_duration")
NOT_IN_PAIRS = {"return_sampling_mask", "beam_width", "return_hidden_states"}
"""SGLang's pairs refuse these."""
OF_PAIRS = ("prefill_",)
"""Beginnings of names that only answers of pairs have."""
TOLERANCE = 2e-3
"""Of logprobs, which a batch of another shape computes in another order."""


def draw_valid(rng: random.Random) -> Drawn:
    """A request that the router accepts and whose answer does not depend on chance."""
    while True:
        one = draw(rng, where=rng.choice(list(In)))
        body = _determined(one.api, one.body)
        if asks_for_much(body) or any(field.split(".")[1] in NOT_IN_PAIRS for field in one.fields):
            continue
        try:
            read_request(one.api, body, LIMITS, new_rid="x")
        except BadRequest:
            continue
        return Drawn(one.api, body, one.fields)


def _determined(api: Api, body: dict[str, Any]) -> dict[str, Any]:
    """`body` with greedy sampling, for the model that both have."""
    body = {**body, "model": "default"}
    if api is not Api.GENERATE:
        return {**body, "temperature": 0}
    params = body.get("sampling_params")
    if isinstance(params, list):
        return {
            **body,
            "sampling_params": [{**one, "temperature": 0} for one in params if isinstance(one, dict)],
        }
    return {**body, "sampling_params": {**params, "temperature": 0}} if isinstance(params, dict) else body


def difference(one: Drawn, server_url: str, pair_url: str) -> str | None:
    """Where the two answers differ; None if they do not."""
    expected, seen = (_answer(url, one) for url in (server_url, pair_url))
    return first_difference(expected, seen)


def _answer(url: str, one: Drawn) -> Any:
    answer = requests.post(
        url + one.api, data=one.raw(), headers={"Content-Type": "application/json"}, timeout=60
    )
    if answer.status_code != 200:
        return {"status": answer.status_code // 100}
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        return {"status": 2, "answer": answer.json()}
    events = [line[6:] for line in answer.content.split(b"\n") if line.startswith(b"data: {")]
    parsed = [json.loads(event) for event in events]
    codes = [_code(event) for event in parsed]
    if any(codes):
        return {"status": next(filter(None, codes)) // 100}
    return {"status": 2, "answer": _joined(one.api, parsed)}


def _code(event: Any) -> int | None:
    """The status of an event that reports an error."""
    reason = event.get("meta_info", {}).get("finish_reason") or {}
    code = event["error"].get("code") if "error" in event else reason.get("status_code")
    return code if isinstance(code, int) else 500 if "error" in event else None


def _joined(api: Api, events: list[Any]) -> Any:
    """What a client has after a stream: how the text is cut into events is left to the servers."""
    if api is Api.GENERATE:
        last: dict[int, Any] = {}
        for event in events:
            last[event.get("index", 0)] = event
        return [last[index] for index in sorted(last)]
    joined: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event.get("choices") or ():
            state = joined.setdefault(choice["index"], {"text": "", "logprobs": []})
            delta = choice.get("delta") or {}
            state["text"] += choice.get("text") or delta.get("content") or ""
            state["logprobs"] += _flat(choice.get("logprobs"))
            state["finish_reason"] = choice.get("finish_reason") or state.get("finish_reason")
    usages = [event["usage"] for event in events if event.get("usage") and not event.get("choices")]
    return [[joined[index] for index in sorted(joined)], usages]


def _flat(logprobs: Any) -> list[Any]:
    if not isinstance(logprobs, dict):
        return []
    return list(logprobs.get("content") or logprobs.get("token_logprobs") or [])


def first_difference(expected: Any, seen: Any, path: str = "answer") -> str | None:
    """The path and the two values of the first difference; None if there is none."""
    if isinstance(expected, dict) and isinstance(seen, dict):
        names = {name for name in expected.keys() | seen.keys() if not _is_unequal(name)}
        for name in sorted(names):
            if name in expected and name not in seen:
                return f"{path}.{name} is missing: {str(expected[name])[:200]}"
            if name not in expected:
                if name.startswith(OF_PAIRS):
                    continue
                return f"{path}.{name} is new: {str(seen[name])[:200]}"
            if found := first_difference(expected[name], seen[name], f"{path}.{name}"):
                return found
        return None
    if isinstance(expected, list) and isinstance(seen, list) and len(expected) == len(seen):
        pairs = enumerate(zip(expected, seen, strict=True))
        return next((at for i, (a, b) in pairs if (at := first_difference(a, b, f"{path}[{i}]"))), None)
    if isinstance(expected, float) and isinstance(seen, float) and abs(expected - seen) <= TOLERANCE:
        return None
    return (
        None
        if expected == seen
        else f"{path}: {str(expected)[:200]} of one server, {str(seen)[:200]} of the pair"
    )


def _is_unequal(name: str) -> bool:
    return name in UNEQUAL or name.endswith(UNEQUAL_ENDINGS)
