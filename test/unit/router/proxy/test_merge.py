"""What a pair's client gets is what one server answers: SGLang's own answers, shortened."""

from __future__ import annotations

import asyncio
import json
from copy import deepcopy
from typing import Any

import pytest

from memserve.router.proxy.merge import LogprobMerger, merge_answers
from memserve.router.request import Api, GenerationRequest
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import pair, staged

IDS = "output_token_ids_logprobs"
FIRST = [[-6.529, 5, None], [-10.412, 6, None]]
LATER = [[[-15.21, 5, None], [-9.5, 6, None]], [[-13.875, 5, None], [-11.25, 6, None]]]
PROMPT = [[-4.5, 77, None], [-3.25, 12, None]]


def meta(ids: list[Any], tokens: list[Any], count: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": "x",
        "finish_reason": None,
        "prompt_tokens": 3,
        "completion_tokens": count,
        "output_token_logprobs": tokens,
        "output_token_logprobs_length": len(tokens),
        IDS: ids,
        **fields,
    }


TOKENS = [[-1.336, 32, None], [-0.75, 17, None], [-2.5, 67, None]]
PREFILL = {
    "text": "A",
    "output_ids": [32],
    "meta_info": meta([FIRST], TOKENS[:1], 1, input_token_logprobs=PROMPT, cached_tokens=2, e2e_latency=0.1),
}


def answer(count: int, *, of_pair: bool, since: int = 0) -> dict[str, Any]:
    """The answer, or an event, after `count` tokens, with the rows of the tokens from `since` on."""
    rows: list[Any] = [None if of_pair else FIRST, *LATER][since:count]
    told = {"input_token_logprobs": [] if of_pair else PROMPT}
    return {"text": "A2d"[:count], "meta_info": meta(rows, TOKENS[since:count], count, **told)}


def call(num_prompts: int | None = None) -> GenerationRequest:
    body = {"return_logprob": True, "token_ids_logprob": [5, 6]}
    return GenerationRequest(Api.GENERATE, body, "x", False, ("x",), num_prompts, 1, None)


def merged(prefill: Any, decode: Any, num_prompts: int | None = None) -> Any:
    return json.loads(merge_answers(call(num_prompts), prefill, json.dumps(decode).encode()))


def without_report(item: dict[str, Any]) -> dict[str, Any]:
    told = {name: value for name, value in item["meta_info"].items() if not name.startswith("prefill_")}
    return {**item, "meta_info": told}


@pytest.mark.parametrize("count", [1, 3])
def test_whole_answer_has_the_first_tokens_logprobs_of_prefill(count: int) -> None:
    own = merged(PREFILL, answer(count, of_pair=True))
    assert without_report(own) == answer(count, of_pair=False)


def test_each_answer_of_a_batch_has_its_own_first_token() -> None:
    other: Any = deepcopy(PREFILL)
    other["meta_info"][IDS] = [[[-1.0, 5, None]]]
    own = merged([PREFILL, other], [answer(2, of_pair=True), answer(2, of_pair=True)], 2)
    assert [item["meta_info"][IDS][0] for item in own] == [FIRST, [[-1.0, 5, None]]]


def test_prompt_without_logprobs_in_a_batch_stays_without() -> None:
    plain = {"text": "A", "meta_info": {"completion_tokens": 1, "cached_tokens": 0, "e2e_latency": 1.0}}
    own = merged([PREFILL, plain], [answer(1, of_pair=True), plain], 2)
    assert IDS not in own[1]["meta_info"]


@pytest.mark.parametrize("is_incremental", [False, True])
def test_streamed_events_have_the_first_tokens_logprobs_of_prefill(is_incremental: bool) -> None:
    """Whether each event holds the rows of all tokens, or those of its own tokens."""
    merger = LogprobMerger(call(), PREFILL)
    for begin, count in ((0, 1), (1, 2), (2, 3)):
        since = begin if is_incremental else 0
        event = b"data: %s\n\n" % json.dumps(answer(count, of_pair=True, since=since)).encode()
        assert json.loads(merger.rewrite(event)[6:]) == answer(count, of_pair=False, since=since)


def test_later_event_without_a_row_gets_none_of_the_first_token() -> None:
    event = answer(3, of_pair=True, since=2)
    event["meta_info"][IDS] = [None]
    rewritten = LogprobMerger(call(), PREFILL).rewrite(b"data: %s\n\n" % json.dumps(event).encode())
    assert json.loads(rewritten[6:])["meta_info"][IDS] == [None]


def test_answer_of_no_tokens_has_no_tokens_logprobs() -> None:
    decode = {"text": "", "meta_info": meta([None], TOKENS[:1], 0)}
    own = merged(PREFILL, decode)["meta_info"]
    assert (own["output_token_logprobs"], own["output_token_logprobs_length"]) == ([], 0)


ASKED = [("return_hidden_states", [True]), ("return_routed_experts", True), ("return_indexer_topk", True)]


@pytest.mark.parametrize(("name", "value"), ASKED)
@pytest.mark.parametrize("stream", [False, True])
async def test_values_that_a_pair_loses_are_refused_or_asked_of_one_server(
    name: str, value: Any, stream: bool
) -> None:
    body = {"text": ["a"], name: value, "stream": stream}
    returned = {f"enable_{name}": True}
    legs = [FakeWorker(role, server_info=returned) for role in (Role.PREFILL, Role.DECODE)]
    async with staged(*legs) as stage:
        async with stage.client.post(stage.url("/generate"), json=body) as response:
            error = (await response.json())["error"]
        assert (response.status, error["param"], error["retryable"]) == (400, name, False)
        assert not stage.prefill.requests
        assert not stage.decode.requests
    async with staged(*pair(), FakeWorker(Role.COLOCATED)) as stage:
        asked = [stage.client.post(stage.url("/generate"), json=body) for _ in range(6)]
        for response in await asyncio.gather(*asked):
            async with response:
                assert response.status == 200
        assert len(stage.colocated.requests) == 6


@pytest.mark.parametrize(("name", "value"), ASKED)
async def test_values_that_no_server_of_a_pair_returns_are_left_to_the_servers(name: str, value: Any) -> None:
    async with staged(*pair()) as stage:
        assert (await stage.post("/generate", {"text": ["a"], name: value}))[0] == 200
        assert stage.decode.requests[0].body[name] == value


async def test_hidden_states_that_are_not_wanted_are_no_reason_to_refuse() -> None:
    async with staged(*pair()) as stage:
        status, _ = await stage.post("/generate", {"text": ["a"], "return_hidden_states": [False]})
        assert status == 200
