"""PromptReader: tokens, namespaces and sessions of requests; servers confirm the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memserve.core.block_keys import Namespace, page_keys
from memserve.core.ids import InstanceId
from memserve.router.field_kinds import ModelLimits
from memserve.router.proxy.validation import read_request
from memserve.router.request import Api, GenerationRequest
from memserve.router.sglang_api import DEFAULT_OUTPUT_TOKENS
from memserve.router.tokenization.prompts import (
    NO_PAGES,
    PromptReader,
    namespace_of,
    session_of,
)
from memserve.router.tokenization.tokenizers import NOT_WANTED, OFF, TokenizerMismatch, Tokenizers

from .token_harness import SglangServer, written_model

PAGE = 4
A, B = InstanceId("a"), InstanceId("b")


def call(body: dict[str, Any], api: Api = Api.GENERATE) -> GenerationRequest:
    return read_request(api, body, ModelLimits(takes_empty_text=True), "rid")


async def answer_no_tokens(_: object) -> object:
    return {"tokens": []}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_model(tmp_path_factory.mktemp("model"), "llama2")


@pytest.fixture(scope="module")
def server(model: Path) -> SglangServer:
    return SglangServer(model)


async def admitted(server: SglangServer, model: Path, *names: InstanceId) -> Tokenizers:
    tokenizers = Tokenizers(None)
    for name in names:
        await tokenizers.admit(name, "m", str(model), server.info, server.ask)
    return tokenizers


async def test_prompt_reader_turns_text_into_the_servers_ids_and_keys(
    server: SglangServer, model: Path
) -> None:
    tokenizers = await admitted(server, model, A)
    text = "The quick brown fox jumps over the lazy dog"
    forwarded, prompt, _ = await PromptReader(tokenizers).read(call({"text": text}), "m", PAGE, {})
    ids = server.text_ids(text)
    assert forwarded.body == {"input_ids": ids}
    assert (prompt.num_tokens, prompt.unknown) == (len(ids), None)
    assert [list(chain) for chain in prompt.chains] == [page_keys(ids, PAGE)]
    assert tokenizers.reasons() == {}
    tokenizers.close()


async def test_instance_with_another_tokenizer_is_refused_with_the_others_id(
    server: SglangServer, model: Path
) -> None:
    tokenizers = await admitted(server, model, A)
    with pytest.raises(TokenizerMismatch, match="tokenizer is not that of a"):
        await tokenizers.admit(B, "m", str(model), {}, answer_no_tokens)
    _, prompt, _ = await PromptReader(tokenizers).read(call({"text": "hello"}), "m", PAGE, {})
    assert prompt.unknown is None, "the others are not touched by it"
    tokenizers.close()


async def test_unconfirmed_tokenizer_leaves_tokens_unknown(server: SglangServer, model: Path) -> None:
    tokenizers = Tokenizers(str(model))
    await tokenizers.admit(A, "m", "/nowhere", {}, answer_no_tokens)
    original = call({"text": "hello"})
    forwarded, prompt, _ = await PromptReader(tokenizers).read(original, "m", PAGE, {})
    assert forwarded is original
    assert prompt.unknown
    assert "m" in tokenizers.reasons()
    tokenizers.forget(A)
    await tokenizers.admit(B, "m", "/nowhere", server.info, server.ask)
    assert (await PromptReader(tokenizers).read(original, "m", PAGE, {}))[1].unknown is None
    tokenizers.close()


async def test_request_with_ids_needs_no_tokenizer() -> None:
    tokenizers = Tokenizers(OFF)
    await tokenizers.admit(A, "m", "/nowhere", {}, answer_no_tokens)
    assert tokenizers.reasons() == {"m": NOT_WANTED}
    reader = PromptReader(tokenizers)
    assert (await reader.read(call({"input_ids": [1] * 9}), "m", PAGE, {}))[1].num_tokens == 9
    assert (await reader.read(call({"text": "hello"}), "m", PAGE, {}))[1].unknown == NOT_WANTED
    assert (await reader.read(call({"input_ids": [1] * 9}), "m", None, {}))[1].unknown == NO_PAGES
    image = call({"input_ids": [1] * 9, "image_data": "x"})
    assert (await reader.read(image, "m", PAGE, {}))[1].unknown


async def test_each_prompt_of_a_batch_has_its_own_keys_and_salt() -> None:
    body = {"input_ids": [[1] * 8, [1] * 8, [1] * 8], "cache_salt": ["x", "", "x"]}
    _, prompt, _ = await PromptReader(Tokenizers(OFF)).read(call(body), "m", PAGE, {})
    plain, salted = page_keys([1] * 8, PAGE), page_keys([1] * 8, PAGE, Namespace(None, "x"))
    assert [list(chain) for chain in prompt.chains] == [salted, plain, salted]
    assert prompt.num_tokens == 24


@pytest.mark.parametrize(
    ("body", "number", "namespace"),
    [
        ({}, None, None),
        ({"cache_salt": "s"}, None, Namespace(None, "s")),
        ({"extra_key": "e", "cache_salt": "s"}, None, Namespace("e", "s")),
        ({"extra_key": ""}, None, Namespace("", None)),
        ({"extra_key": ""}, 0, None),
        ({"extra_key": ["e", "f"]}, 1, Namespace("f", None)),
        ({"extra_key": ["e"]}, 1, None),
        ({"cache_salt": 5}, None, None),
    ],
)
def test_namespaces_follow_sglangs_rules(
    body: dict[str, Any], number: int | None, namespace: Namespace | None
) -> None:
    assert namespace_of(body, number) == namespace


def test_session_is_of_a_header_or_else_of_the_user() -> None:
    assert session_of({}, {}) is None
    assert session_of({"user": "u"}, {}) == session_of({}, {"x-session-id": "u"}) is not None
    assert session_of({"user": "u"}, {"x-session-id": "s"}) == session_of({}, {"x-user-id": "s"})
    assert session_of({"user": 5}, {}) is None


@pytest.mark.parametrize(
    ("api", "body", "expected"),
    [
        (Api.GENERATE, {"text": "a", "sampling_params": {"max_new_tokens": 7}}, 7),
        (Api.GENERATE, {"text": "a"}, DEFAULT_OUTPUT_TOKENS),
        (Api.COMPLETIONS, {"prompt": "a", "max_tokens": 9}, 9),
        (Api.COMPLETIONS, {"prompt": "a", "max_tokens": 10**9}, DEFAULT_OUTPUT_TOKENS),
    ],
)
def test_expected_output_tokens_follow_the_requests_limit(
    api: Api, body: dict[str, Any], expected: int
) -> None:
    assert call(body, api).expected_output_tokens == expected


async def test_text_routing_tokenizes_nothing_and_uses_reported_keys(
    server: SglangServer, model: Path
) -> None:
    reader = PromptReader(await admitted(server, model, A), "text")
    long = call({"text": "word " * 500})
    sent, prompt, _ = await reader.read(long, "m", PAGE, {})
    assert sent is long
    assert (prompt.by_text, prompt.unknown) == (True, None)
    keys = page_keys(list(range(400)), PAGE)
    reader.text_keys.record_keys("rid", keys)
    _, again, _ = await reader.read(long, "m", PAGE, {})
    assert not again.by_text
    assert again.chains[0] == keys[: len(again.chains[0])]
    assert len(again.chains[0]) > 0.7 * len(keys)
    ids = call({"input_ids": [1, 2, 3, 4]})
    assert (await reader.read(ids, "m", PAGE, {}))[1].chains == (page_keys([1, 2, 3, 4], PAGE),)


async def test_unknown_tokens_get_text_keys_unless_token_keys_are_required() -> None:
    long = call({"text": "word " * 500})
    for keys, by_text in (("auto", True), ("tokens", False)):
        reader = PromptReader(Tokenizers(OFF), keys)  # type: ignore[arg-type]
        _, prompt, _ = await reader.read(long, "m", PAGE, {})
        assert (prompt.by_text, bool(prompt.chains)) == (by_text, by_text)
        assert prompt.unknown is not None
