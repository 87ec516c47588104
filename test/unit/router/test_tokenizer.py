"""The router's token ids are SGLang's, and where they might not be, it says so."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from memserve.router.api import Api, Call
from memserve.router.token_records import KnownTokens, Tokens, UnknownTokens
from memserve.router.tokenizer import Tokenizer
from memserve.router.validation import Limits, read_call

from .token_stage import MODELS, SglangServer, written_model

LIMITS = Limits(takes_empty_text=True)
ALL = ("tiny", *MODELS)

USER = {"role": "user", "content": "Hello, world! It's  12345 times\n\n\nnaïve cafe\u0301 日本語 🙂"}
ANSWER = {"role": "assistant", "content": " Yes, we'll say so. "}
SYSTEM = {"role": "system", "content": "Be brief."}
MIMICRY = "<|im_start|>system\nx<|im_end|></s>[INST] a|>b <|eot_id|>\n<|im<|im_end|"
MIMIC = {"role": "user", "content": MIMICRY}
TOOL = {
    "type": "function",
    "function": {
        "description": "The <weather>.",
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": ["string", "null"]}}, "x": 1.0},
        "unknown": 1,
    },
}
BARE_TOOL = {"type": "function", "function": {"name": "noon", "strict": True}}
CALL = {"name": "weather", "arguments": '{"city": "Ås", "n": 1e3}'}
CALLS = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Ås", "n": 1e3}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "rain & <snow>", "name": "weather"}
PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]

CHATS: dict[str, dict[str, Any]] = {
    "a user": {"messages": [USER]},
    "a system": {"messages": [SYSTEM, USER]},
    "an empty system": {"messages": [{"role": "system", "content": ""}, USER]},
    "a system without content": {"messages": [{"role": "SYSTEM"}, USER]},
    "a history": {"messages": [USER, ANSWER, USER, ANSWER, {"role": "user", "content": ""}]},
    "a developer and a name": {
        "messages": [{"role": "developer", "content": "x", "name": "y", "z": 1}, USER]
    },
    "special tokens of the user": {"messages": [MIMIC, ANSWER, MIMIC]},
    "a last answer": {"messages": [USER, ANSWER]},
    "a last answer to continue": {"messages": [USER, ANSWER], "continue_final_message": True},
    "an empty answer to continue": {
        "messages": [USER, {"role": "assistant", "content": ""}],
        "continue_final_message": True,
    },
    "special tokens to continue": {
        "messages": [USER, {**MIMIC, "role": "assistant"}],
        "continue_final_message": True,
    },
    "parts": {"messages": [{"role": "user", "content": PARTS}, ANSWER, {"role": "user", "content": []}]},
    "a last answer in parts": {"messages": [USER, {"role": "assistant", "content": PARTS}]},
    "tools": {"messages": [USER], "tools": [TOOL, BARE_TOOL]},
    "no tools": {"messages": [USER], "tools": []},
    "unwanted tools": {"messages": [USER], "tools": [TOOL], "tool_choice": "none"},
    "one tool of two": {
        "messages": [USER],
        "tools": [TOOL, BARE_TOOL],
        "tool_choice": {"type": "function", "function": {"name": "noon"}},
    },
    "a tool call": {"messages": [USER, CALLS, RESULT], "tools": [TOOL]},
    "a tool's result in parts": {"messages": [USER, CALLS, {**RESULT, "content": PARTS}]},
    "reasoning": {"messages": [USER, {**ANSWER, "reasoning_content": "Hm. <think>"}, USER]},
    "variables": {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False, "date_string": "x"}},
    "a variable that is a special token": {"messages": [USER], "chat_template_kwargs": {"bos_token": "B"}},
}
TEXTS = [
    "Hello, world! It's  12345 times\n\n\nnaïve cafe\u0301 日本語 🙂",
    " leading and trailing ",
    MIMICRY,
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "",
]


@pytest.fixture(scope="session")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {"tiny": tiny_model} | {name: written_model(directory, name) for name in MODELS}


@pytest.fixture(scope="session")
def servers(models: dict[str, Path]) -> dict[str, SglangServer]:
    return {name: SglangServer(path) for name, path in models.items()}


def confirmed(path: Path, server: SglangServer) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    asyncio.run(tokenizer.verify("server", server.info, server.ask))
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(models: dict[str, Path], servers: dict[str, SglangServer]) -> dict[str, Tokenizer]:
    return {name: confirmed(path, servers[name]) for name, path in models.items()}


@pytest.fixture
def tiny(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["tiny"]


def call(api: Api, **body: Any) -> Call:
    return read_call(api, body, LIMITS, new_rid="new")


def tokens_of(tokenizer: Tokenizer, api: Api, **body: Any) -> Tokens:
    return asyncio.run(tokenizer.tokens_of(call(api, **body)))


def ids_of(tokenizer: Tokenizer, api: Api, **body: Any) -> list[list[int]]:
    tokens = tokens_of(tokenizer, api, **body)
    assert isinstance(tokens, KnownTokens), tokens
    return [list(ids) for ids in tokens.prompts]


@pytest.mark.parametrize("model", ALL)
def test_texts_have_the_ids_of_the_server(
    tokenizers: dict[str, Tokenizer], servers: dict[str, SglangServer], model: str
) -> None:
    expected = [servers[model].text_ids(text) for text in TEXTS]
    for _ in ("cold", "cached"):
        assert ids_of(tokenizers[model], Api.GENERATE, text=TEXTS) == expected
    assert ids_of(tokenizers[model], Api.GENERATE, text=TEXTS[0]) == expected[:1]
    assert ids_of(tokenizers[model], Api.COMPLETIONS, prompt=TEXTS[1:3]) == expected[1:3]
    assert ids_of(tokenizers[model], Api.COMPLETIONS, prompt=TEXTS[3]) == expected[3:4]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("model", ALL)
def test_chats_have_the_ids_of_the_server(
    tokenizers: dict[str, Tokenizer], servers: dict[str, SglangServer], model: str, chat: str
) -> None:
    try:
        expected = servers[model].chat_ids(CHATS[chat])
    except ValueError:
        assert isinstance(tokens_of(tokenizers[model], Api.CHAT, **CHATS[chat]), UnknownTokens)
        return
    for _ in ("cold", "cached"):
        assert ids_of(tokenizers[model], Api.CHAT, **CHATS[chat]) == [expected]
