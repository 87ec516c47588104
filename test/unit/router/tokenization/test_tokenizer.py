"""Tokenizer: its ids equal SGLang's, or are unknown."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from memserve.core.block_keys import Namespace, page_keys
from memserve.core.errors import ConfigError
from memserve.router.field_kinds import ModelLimits
from memserve.router.proxy.validation import read_request
from memserve.router.request import Api, GenerationRequest
from memserve.router.tokenization.token_probes import probe_texts, renders_chats
from memserve.router.tokenization.token_records import KnownTokens, Tokens, UnknownTokens
from memserve.router.tokenization.tokenizer import UNCONFIRMED, Tokenizer

from .token_harness import CHATML, MODELS, TODAY, SglangServer, byte_level, write_model, written_model

LIMITS = ModelLimits(takes_empty_text=True)
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


def call(api: Api, **body: Any) -> GenerationRequest:
    return read_request(api, body, LIMITS, new_rid="new")


def tokens_of(tokenizer: Tokenizer, api: Api, **body: Any) -> Tokens:
    return asyncio.run(tokenizer.tokens_of(call(api, **body)))


def ids_of(tokenizer: Tokenizer, api: Api, **body: Any) -> list[list[int]]:
    tokens = tokens_of(tokenizer, api, **body)
    assert isinstance(tokens, KnownTokens), tokens
    return [list(ids) for ids in tokens.prompts]


@pytest.mark.parametrize("model", ALL)
def test_tokenizer_gives_the_servers_ids_of_texts(
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
def test_tokenizer_gives_the_servers_ids_of_chats(
    tokenizers: dict[str, Tokenizer], servers: dict[str, SglangServer], model: str, chat: str
) -> None:
    try:
        expected = servers[model].chat_ids(CHATS[chat])
    except ValueError:
        assert isinstance(tokens_of(tokenizers[model], Api.CHAT, **CHATS[chat]), UnknownTokens)
        return
    for _ in ("cold", "cached"):
        assert ids_of(tokenizers[model], Api.CHAT, **CHATS[chat]) == [expected]


@pytest.mark.parametrize(
    ("api", "body", "reason"),
    [
        (Api.GENERATE, {"text": "x", "lora_path": "adapter"}, "a LoRA adapter"),
        (Api.GENERATE, {"input_ids": [[1]], "lora_path": ["adapter"]}, "a LoRA adapter"),
        (Api.GENERATE, {"text": "x", "image_data": "image.png"}, "multimodal content"),
        (Api.GENERATE, {"input_embeds": [[0.5]]}, "embeddings in place of tokens"),
        (Api.GENERATE, {"text": "x", "session_params": {"id": "s"}}, "a session, whose tokens a server has"),
        (Api.GENERATE, {"text": "\ud800"}, "text that is no Unicode"),
        (Api.COMPLETIONS, {"prompt": "x", "suffix": "y"}, "a suffix"),
        (Api.COMPLETIONS, {"prompt": "x", "model": "tiny:adapter"}, "a LoRA adapter"),
        (Api.CHAT, {"messages": [USER], "model": "tiny:adapter"}, "a LoRA adapter"),
        (Api.CHAT, {"messages": [USER], "reasoning_effort": "low"}, "reasoning settings"),
        (
            Api.CHAT,
            {"messages": [USER], "chat_template_kwargs": {"reasoning_effort": 1}},
            "reasoning settings",
        ),
        (
            Api.CHAT,
            {"messages": [USER], "chat_template_kwargs": {"chat_template": "x"}},
            "template variables that are not the template's",
        ),
        (
            Api.CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
            "multimodal content",
        ),
        (
            Api.CHAT,
            {"messages": [USER], "tools": [{"function": {"name": "f", "parameters": {"type": "varchar"}}}]},
            "a tool's schema with types of its own",
        ),
        (
            Api.CHAT,
            {"messages": [USER], "tools": [{"function": {"name": "f", "defer_loading": True}}]},
            "tools that are loaded later",
        ),
        (Api.CHAT, {"messages": [{**SYSTEM, "tools": [TOOL]}]}, "tools of a message"),
        (Api.CHAT, {"messages": [{"role": "User", "content": "x"}]}, "a chat that is not well formed"),
        (Api.CHAT, {"messages": [{"role": "user"}]}, "a chat that is not well formed"),
        (Api.CHAT, {"messages": [ANSWER], "continue_final_message": True}, "a chat that is not well formed"),
        (
            Api.CHAT,
            {"messages": [{**CALLS, "tool_calls": [{"function": {"arguments": "not JSON"}}]}]},
            "a chat that is not well formed",
        ),
        (
            Api.CHAT,
            {
                "messages": [
                    {**CALLS, "tool_calls": [{"function": {"arguments": '{"n": 12345678901234567890}'}}]}
                ]
            },
            "numbers that JSON readers disagree on",
        ),
    ],
)
def test_tokens_that_only_a_server_can_tell_are_unknown(
    models: dict[str, Path], tiny: Tokenizer, api: Api, body: dict[str, Any], reason: str
) -> None:
    before = tiny.stats.unknown[reason]
    assert tokens_of(tiny, api, **body) == UnknownTokens(reason)
    assert tiny.stats.unknown[reason] == before + 1


def test_model_with_a_colon_in_its_name_is_no_adapter(tiny: Tokenizer) -> None:
    assert ids_of(tiny, Api.COMPLETIONS, prompt=[1, 2], model="tiny:latest") == [[1, 2]]


def test_tokens_of_a_chat_that_the_template_refuses_are_unknown(tokenizers: dict[str, Tokenizer]) -> None:
    assert tokens_of(tokenizers["mistral"], Api.CHAT, messages=[USER, USER]) == UnknownTokens(
        "a chat that the template refuses"
    )


def test_given_ids_are_the_tokens(models: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(models["tiny"])  # no server confirmed it
    assert ids_of(tokenizer, Api.GENERATE, input_ids=[1, 2]) == [[1, 2]]
    assert ids_of(tokenizer, Api.GENERATE, input_ids=[[1, 2], [3]]) == [[1, 2], [3]]
    assert ids_of(tokenizer, Api.COMPLETIONS, prompt=[[1, 2], [3]]) == [[1, 2], [3]]
    assert ids_of(tokenizer, Api.CHAT, messages=[USER], input_ids=[1, 2]) == [[1, 2]]
    assert tokenizer.stats.calls == 0


def test_page_keys_leave_out_a_partial_page() -> None:
    namespace = Namespace(cache_salt="tenant")
    assert page_keys(range(40), 16, namespace) == page_keys(list(range(32)), 16, namespace)


@pytest.mark.parametrize("num_prompts", ["one", "many"])
def test_text_is_forwarded_as_ids(tiny: Tokenizer, num_prompts: str) -> None:
    text: Any = "hello" if num_prompts == "one" else ["hello", "you"]
    one = call(Api.GENERATE, text=text, sampling_params={"n": 2}, rid=None)
    tokens = asyncio.run(tiny.tokens_of(one))
    assert isinstance(tokens, KnownTokens)
    ids = [list(prompt) for prompt in tokens.prompts]
    sent = tiny.with_token_ids(one, tokens)
    expected = ids[0] if num_prompts == "one" else ids
    assert sent.body == {"input_ids": expected, "sampling_params": {"n": 2}, "rid": None}
    assert (sent.rids, sent.num_prompts, sent.num_samples) == (one.rids, one.num_prompts, one.num_samples)
    assert one.body["text"] == text
    other = call(Api.COMPLETIONS, prompt=text, max_tokens=3)
    assert tiny.with_token_ids(other, tokens).body == {"prompt": expected, "max_tokens": 3}


def test_chat_is_forwarded_with_ids_and_messages(tiny: Tokenizer) -> None:
    chat = call(Api.CHAT, messages=[USER], tools=[TOOL])
    tokens = asyncio.run(tiny.tokens_of(chat))
    assert isinstance(tokens, KnownTokens)
    assert tiny.with_token_ids(chat, tokens).body == {**chat.body, "input_ids": list(tokens.prompts[0])}


def test_request_that_ids_cannot_replace_is_forwarded_unchanged(tiny: Tokenizer) -> None:
    echo = call(Api.COMPLETIONS, prompt="hello", echo=True)
    known = asyncio.run(tiny.tokens_of(echo))
    assert isinstance(known, KnownTokens)
    given = call(Api.GENERATE, input_ids=[1, 2])
    text = call(Api.GENERATE, text="hello")
    assert tiny.with_token_ids(echo, known) is echo
    assert tiny.with_token_ids(given, asyncio.run(tiny.tokens_of(given))) is given
    assert tiny.with_token_ids(text, UnknownTokens("x")) is text
    assert tiny.with_token_ids(text, KnownTokens(((1,),), replaceable=False)) is text
    assert tiny.with_token_ids(text, KnownTokens(((),))) is text


def test_ids_of_a_chat_with_the_date_are_for_keys_only(tmp_path: Path) -> None:
    special = {"eos_token": "<|im_end|>"}
    path = write_model(tmp_path / "today", byte_level("<|im_start|>", "<|im_end|>"), TODAY, special)
    server = SglangServer(path)
    chat = call(Api.CHAT, messages=[USER])
    tokenizer = confirmed(path, server)
    tokens = asyncio.run(tokenizer.tokens_of(chat))
    assert isinstance(tokens, KnownTokens)
    assert list(tokens.prompts[0]) == server.chat_ids(chat.body)
    assert tokenizer.with_token_ids(chat, tokens) is chat


def test_tokens_are_unknown_before_a_server_confirms(models: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(models["tiny"])
    assert tokens_of(tokenizer, Api.GENERATE, text="x") == UnknownTokens(UNCONFIRMED)
    assert tokens_of(tokenizer, Api.CHAT, messages=[USER]) == UnknownTokens(UNCONFIRMED)


def test_tokens_are_unknown_if_one_server_disagrees(
    models: dict[str, Path], servers: dict[str, SglangServer]
) -> None:
    tokenizer = confirmed(models["qwen"], servers["qwen"])
    asyncio.run(tokenizer.verify("other", {}, servers["llama3"].ask))
    assert tokens_of(tokenizer, Api.GENERATE, text="x") == UnknownTokens(UNCONFIRMED)
    tokenizer.forget("other")
    assert isinstance(tokens_of(tokenizer, Api.GENERATE, text="x"), KnownTokens)
    tokenizer.forget("server")
    assert tokens_of(tokenizer, Api.GENERATE, text="x") == UnknownTokens(UNCONFIRMED)


def test_verify_detects_another_chat_template(
    models: dict[str, Path], servers: dict[str, SglangServer], tmp_path: Path
) -> None:
    tokenizer, _, special = MODELS["qwen"]()
    other = SglangServer(write_model(tmp_path / "qwen", tokenizer, CHATML, special))
    agreement = asyncio.run(Tokenizer.load(models["qwen"]).verify("other", other.info, other.ask))
    assert (agreement.texts, agreement.chats) == (True, False)


@pytest.mark.parametrize(
    "server_info",
    [{"chat_template": "chatml"}, {"model_path": "models/vicuna-7b"}, {"chat_template": "x.json"}],
)
def test_chats_are_unknown_where_sglang_uses_a_builtin_conversation(
    models: dict[str, Path], servers: dict[str, SglangServer], server_info: dict[str, Any]
) -> None:
    tokenizer = Tokenizer.load(models["tiny"])
    agreement = asyncio.run(tokenizer.verify("server", server_info, servers["tiny"].ask))
    assert (agreement.texts, agreement.chats) == (True, False)


@pytest.mark.parametrize(
    "model_path",
    [
        "/data/checkpoints/Qwen3-8B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "microsoft/Phi-4",
        "WePOINTS/POINTS-1-5",
        "OpenGVLab/InternVL2_5-8B",
        "deepseek-ai/Janus-Pro-7B",
        "lmsys/vicuna-7b-v1.5",
        "lmms-lab/llava-onevision-qwen2-7b-ov",
        "deepseek-ai/deepseek-vl2-small",
        "openbmb/MiniCPM-V-2_6",
        "microsoft/Phi-4-multimodal-instruct",
        "deepseek-ai/DeepSeek-OCR",
        "PaddlePaddle/PaddleOCR-VL",
        "openai/whisper-large-v3",
        "OpenMOSS/MOSS-VL",
    ],
)
def test_guessed_conversations_equal_sglangs(model_path: str) -> None:
    from sglang.srt.parser.conversation import get_conv_template_by_model_path

    guessed = get_conv_template_by_model_path(model_path)
    assert renders_chats({"model_path": model_path, "chat_template": None}) is (guessed is None)


@pytest.mark.parametrize(
    ("config", "template", "reason"),
    [
        ({"vision_config": {}}, CHATML, "a multimodal model"),
        (
            {"architectures": ["DeepseekV4ForCausalLM"]},
            CHATML,
            "a model whose chats SGLang encodes with code",
        ),
        ({}, None, "a model without one chat template"),
        ({}, "{% for x %}", "a model without one chat template"),
    ],
)
def test_chats_of_multimodal_and_specially_encoded_models_are_unknown(
    tmp_path: Path, config: dict[str, Any], template: str | None, reason: str
) -> None:
    tokenizer = Tokenizer.load(write_model(tmp_path, byte_level("<|im_end|>"), template, {}, **config))
    tokens = tokens_of(tokenizer, Api.CHAT, messages=[USER])
    assert isinstance(tokens, UnknownTokens)
    assert tokens.reason.startswith(reason)


def test_probe_texts_bound_the_number_of_special_tokens() -> None:
    assert len(probe_texts([f"<{number}>" for number in range(5000)])) < 600


@pytest.mark.parametrize("found", ["nothing", "no tokenizer", "no JSON", "dropout"])
def test_directory_without_a_fast_tokenizer_is_a_config_error_in_one_line(tmp_path: Path, found: str) -> None:
    file = tmp_path / "tokenizer.json"
    if found == "no JSON":
        file.write_text("{")
    elif found == "no tokenizer":
        file.write_text('{"model": 1}')
    elif found == "dropout":
        tokenizer = byte_level("<|im_end|>")
        tokenizer.save(str(file))
        description = json.loads(file.read_text())
        description["model"]["dropout"] = 0.1
        file.write_text(json.dumps(description))
    with pytest.raises(ConfigError, match=r"tokenizer\.json") as refused:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_cache_holds_the_first_turn_of_a_chat(
    models: dict[str, Path], servers: dict[str, SglangServer]
) -> None:
    tokenizer = confirmed(models["llama3"], servers["llama3"])
    history = [SYSTEM, {"role": "user", "content": "once " * 500}]
    [first] = ids_of(tokenizer, Api.CHAT, messages=history)
    cold = tokenizer.stats.cached_tokens
    [second] = ids_of(tokenizer, Api.CHAT, messages=[*history, ANSWER, USER])
    assert tokenizer.stats.calls == 2
    assert tokenizer.stats.tokens == len(first) + len(second)
    assert tokenizer.stats.cached_tokens - cold > len(first) - 20
    assert tokenizer.stats.seconds > 0
