"""Requests for n > 1 samples on a pair."""

from __future__ import annotations

import json
from typing import Any

import pytest

from memserve.core.errors import BadRequest
from memserve.router.field_kinds import ModelLimits
from memserve.router.proxy.n_sampling import as_batch, as_singles
from memserve.router.proxy.validation import read_request
from memserve.router.request import Api
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import pair, staged

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


def batch(**body: Any) -> dict[str, Any]:
    return as_batch(read_request(Api.GENERATE, body, ModelLimits(), "r")).body


def test_as_batch_repeats_a_single_prompt() -> None:
    body = batch(text="a", sampling_params={"n": 2, "temperature": 1}, image_data=["i", "j"], lora_path="l")
    assert body["text"] == ["a", "a"]
    assert body["sampling_params"] == {"n": 1, "temperature": 1}
    assert body["image_data"] == [["i", "j"], ["i", "j"]]
    assert body["lora_path"] == "l"


def test_as_batch_puts_the_samples_of_a_prompt_side_by_side() -> None:
    body = batch(input_ids=[[1], [2]], sampling_params=[{"n": 2}, {"n": 2, "top_k": 3}], extra_key=["x", "y"])
    assert body["input_ids"] == [[1], [1], [2], [2]]
    assert body["sampling_params"] == [{"n": 1}, {"n": 1}, {"n": 1, "top_k": 3}, {"n": 1, "top_k": 3}]
    assert body["extra_key"] == ["x", "x", "y", "y"]


def test_as_batch_refuses_a_list_of_another_length() -> None:
    with pytest.raises(BadRequest):
        batch(text=["a", "b"], sampling_params={"n": 2}, extra_key=["x"])


def test_as_singles_increases_the_seed_per_sample() -> None:
    call = read_request(Api.CHAT, {**CHAT, "n": 3, "seed": 5}, ModelLimits(), "r")
    assert [(one.body["n"], one.body["seed"], one.rid) for one in as_singles(call)] == [
        (1, 5, "r_000000"),
        (1, 6, "r_000001"),
        (1, 7, "r_000002"),
    ]


async def test_generate_with_n_samples_answers_a_list() -> None:
    async with staged(*pair()) as stage:
        body = {"text": ["a", "b"], "sampling_params": {"n": 2}, "rid": ["x", "y"]}
        status, answers = await stage.post("/generate", body)
        assert status == 200
        assert [one["meta_info"]["id"] for one in answers] == [f"x_00000{number}" for number in range(4)]
        (received,) = stage.decode.requests
        assert received.body["text"] == ["a", "a", "b", "b"]
        assert len(set(received.body["bootstrap_room"])) == 4
        events = await stage.events("/generate", {"text": "a", "sampling_params": {"n": 2}, "stream": True})
        assert {json.loads(event[6:])["index"] for event in events[:-1]} == {0, 1}
        assert events[-1] == b"data: [DONE]"


async def test_openai_answer_with_n_samples_joins_their_choices() -> None:
    async with staged(*pair()) as stage:
        status, answer = await stage.post("/v1/chat/completions", {**CHAT, "n": 3})
        assert status == 200
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 9, 14)
        _, answer = await stage.post("/v1/completions", {"prompt": ["a", "b"], "n": 2})
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"]["prompt_tokens"] == 10
        assert all(len(worker.requests) == 5 for worker in (stage.prefill, stage.decode))


async def test_openai_stream_with_n_samples_joins_their_events() -> None:
    async with staged(*pair()) as stage:
        body = {"prompt": ["a", "b"], "n": 2, "stream": True, "stream_options": {"include_usage": True}}
        events = await stage.events("/v1/completions", body)
        assert events.count(b"data: [DONE]") == 1
        assert events[-1] == b"data: [DONE]"
        *chunks, last = (json.loads(event[6:]) for event in events[:-1])
        texts = dict.fromkeys(range(4), "")
        for chunk in chunks:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
        assert set(texts.values()) == {"Hello, world"}
        assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 12
        assert last["usage"]["prompt_tokens"] == 10


@pytest.mark.parametrize("stream", [False, True])
async def test_failed_sample_ends_the_request_and_aborts_the_others(stream: bool) -> None:
    async with staged(*pair()) as stage:
        stage.decode.script = Script(status=400, message="no")
        status, answer = await stage.post("/v1/chat/completions", {**CHAT, "n": 2, "stream": stream})
        assert (status, answer["error"]["message"]) == (400, "no")


async def test_colocated_server_gets_a_request_for_n_samples_unchanged() -> None:
    async with staged(FakeWorker(Role.COLOCATED)) as stage:
        await stage.post("/v1/chat/completions", {**CHAT, "n": 3})
        (received,) = stage.colocated.requests
        assert received.body["n"] == 3
        assert "bootstrap_room" not in received.body
