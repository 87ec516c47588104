"""The router's token ids equal those of running servers, and may replace the text of a request."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import requests

from memserve.router.field_kinds import ModelLimits
from memserve.router.proxy.validation import read_request
from memserve.router.request import Api, GenerationRequest
from memserve.router.tokenization.token_records import KnownTokens
from memserve.router.tokenization.tokenizer import Tokenizer

from .conftest import REQUEST_TIMEOUT_S, Pair

GREEDY = {"temperature": 0, "max_tokens": 8}
USER = {"role": "user", "content": "Name  three rivers: naïve 日本 🙂\n\n<|im_end|> and so on."}
ANSWER = {"role": "assistant", "content": " The Rhine"}
TOOL = {"type": "function", "function": {"name": "rivers", "parameters": {"type": "object"}}}
TEXT = "Once  upon <|im_start|>a time, 日本.\n"

COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": TEXT},
    {"prompt": [TEXT, "Hello"]},
    {"prompt": TEXT, "echo": True},
    {"prompt": TEXT, "echo": True, "logprobs": 1},
    {"prompt": TEXT, "n": 2},
]
CHATS: list[dict[str, Any]] = [
    {"messages": [USER]},
    {"messages": [{"role": "system", "content": ""}, USER, ANSWER, USER]},
    {"messages": [USER, ANSWER]},
    {"messages": [USER, ANSWER], "continue_final_message": True, "logprobs": True, "top_logprobs": 2},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "stop": ["a", "e"]},
    {"messages": [USER], "tools": [TOOL], "n": 2},
]


@pytest.fixture(scope="module")
def tokenizer(pair: Pair, tiny_model: Path) -> Tokenizer:
    """A tokenizer that both servers have confirmed."""
    tokenizer = Tokenizer.load(tiny_model)
    for url in pair.server_urls():

        async def ask(body: object, url: str = url) -> object:
            page = f"{url}/v1/tokenize"
            response = await asyncio.to_thread(requests.post, page, json=body, timeout=REQUEST_TIMEOUT_S)
            return response.json() if response.status_code == 200 else None

        info = requests.get(f"{url}/server_info", timeout=REQUEST_TIMEOUT_S).json()
        agreement = asyncio.run(tokenizer.verify(url, info, ask))
        assert agreement.texts
        assert agreement.chats
        assert agreement.model
    return tokenizer


def read(tokenizer: Tokenizer, api: Api, body: dict[str, Any]) -> tuple[list[list[int]], GenerationRequest]:
    """The ids of each prompt, and the call to forward."""
    call = read_request(api, body, ModelLimits(), new_rid="new")
    tokens = asyncio.run(tokenizer.tokens_of(call))
    assert isinstance(tokens, KnownTokens), tokens
    return [list(ids) for ids in tokens.prompts], tokenizer.with_token_ids(call, tokens)


def answer(pair: Pair, api: Api, body: dict[str, Any]) -> Any:
    response = pair.post(api, body)
    assert response.status_code == 200, response.text
    return response.json()


def lasting(answer: Any) -> Any:
    """An answer without ids, times, cache counts, and floating-point numbers."""
    passing = {"id", "created", "usage"}
    if isinstance(answer, dict):
        return {name: lasting(value) for name, value in answer.items() if name not in passing}
    if isinstance(answer, list):
        return [lasting(one) for one in answer]
    return 0.0 if isinstance(answer, float) else answer


def counted(answer: Any) -> tuple[int, int]:
    return answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]


@pytest.mark.parametrize("text", [TEXT, [TEXT, "Hello"]], ids=["one", "many"])
def test_generate_uses_the_router_token_ids(tokenizer: Tokenizer, pair: Pair, text: Any) -> None:
    params = {"temperature": 0, "max_new_tokens": 8}
    body = {"text": text, "sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
    ids, forwarded = read(tokenizer, Api.GENERATE, body)
    assert "text" not in forwarded.body
    told, again = answer(pair, Api.GENERATE, body), answer(pair, Api.GENERATE, forwarded.body)
    for expected, one in zip(ids, told if isinstance(told, list) else [told], strict=True):
        assert [entry[1] for entry in one["meta_info"]["input_token_logprobs"]] == expected
    assert _ids_of(again) == _ids_of(told)


def _ids_of(answer: Any) -> list[tuple[Any, ...]]:
    """The token fields of an answer to /generate. Logprobs vary with the batch of a prompt."""
    answers = answer if isinstance(answer, list) else [answer]
    return [
        (
            one["text"],
            one["output_ids"],
            one["meta_info"]["prompt_tokens"],
            one["meta_info"]["finish_reason"],
            [entry[1:] for entry in one["meta_info"]["input_token_logprobs"]],
        )
        for one in answers
    ]


@pytest.mark.parametrize("body", COMPLETIONS, ids=str)
def test_completions_use_the_router_token_ids(tokenizer: Tokenizer, pair: Pair, body: dict[str, Any]) -> None:
    body = {**GREEDY, **body}
    ids, forwarded = read(tokenizer, Api.COMPLETIONS, body)
    told, again = answer(pair, Api.COMPLETIONS, body), answer(pair, Api.COMPLETIONS, forwarded.body)
    assert told["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert counted(again) == counted(told)
    assert lasting(again) == lasting(told)


@pytest.mark.parametrize("body", CHATS, ids="-".join)
def test_chats_use_the_router_token_ids(tokenizer: Tokenizer, pair: Pair, body: dict[str, Any]) -> None:
    body = {**GREEDY, **body}
    [ids], forwarded = read(tokenizer, Api.CHAT, body)
    assert forwarded.body["input_ids"] == ids
    shown = {**body, "return_prompt_token_ids": True, "n": 1}
    [choice] = answer(pair, Api.CHAT, shown)["choices"]
    assert choice["prompt_token_ids"] == ids
    told, again = answer(pair, Api.CHAT, body), answer(pair, Api.CHAT, forwarded.body)
    assert told["usage"]["prompt_tokens"] == len(ids)
    assert counted(again) == counted(told)
    assert lasting(again) == lasting(told)
