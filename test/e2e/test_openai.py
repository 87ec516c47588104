"""The `openai` package against a prefill/decode pair."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from .conftest import REQUEST_TIMEOUT_S, Pair

MESSAGES: Any = [{"role": "user", "content": "Name three rivers."}]


@pytest.fixture
def client(pair: Pair) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{pair.url}/v1", api_key="none", timeout=REQUEST_TIMEOUT_S, max_retries=0)


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_streamed_chat_equals_the_whole_chat(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=20, temperature=0)
    stream = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20


def test_usage_reports_cached_tokens(client: openai.OpenAI, model: str) -> None:
    for _ in range(2):
        answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=4, temperature=0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens // 16 * 16


@pytest.mark.parametrize("stream", [False, True])
def test_chat_returns_n_choices(client: openai.OpenAI, model: str, stream: bool) -> None:
    answer: Any = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=6, n=3, temperature=0.8, stream=stream
    )
    texts = dict.fromkeys(range(3), "")
    if stream:
        for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        texts = {choice.index: choice.message.content for choice in answer.choices}
    assert sorted(texts) == [0, 1, 2]
    assert all(texts.values())


def test_completions_accept_a_list_of_prompts(client: openai.OpenAI, model: str) -> None:
    prompts = ["One, two, ", "A, B, ", [65, 66, 67]]
    singles = [
        client.completions.create(model=model, prompt=each, max_tokens=6, temperature=0).choices[0].text
        for each in prompts[:2]
    ]
    answer = client.completions.create(model=model, prompt=prompts[:2], max_tokens=6, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.text for choice in answer.choices] == singles


def test_echoed_logprobs_cover_prompt_and_answer(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="Hello there", max_tokens=4, temperature=0, logprobs=1, echo=True
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert answer.choices[0].text.startswith("Hello there")


def test_unknown_model_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.chat.completions.create(model="no-such-model", messages=MESSAGES)
