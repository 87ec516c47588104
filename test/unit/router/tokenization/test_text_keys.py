"""Text keys: equal as far as the texts are, different where other fields change the prompt."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.block_keys import KEY_BYTES, BlockKey, Namespace
from memserve.router.field_kinds import ModelLimits
from memserve.router.proxy.validation import read_request
from memserve.router.request import Api, GenerationRequest
from memserve.router.tokenization.text_keys import BLOCK_TOKENS, BYTES_PER_TOKEN, text_chain, text_of

CHUNK = BLOCK_TOKENS * BYTES_PER_TOKEN
LONG = "word " * CHUNK


def call(body: dict[str, Any], api: Api = Api.GENERATE) -> GenerationRequest:
    return read_request(api, body, ModelLimits(takes_empty_text=True), "rid")


def chain(
    body: dict[str, Any], api: Api = Api.GENERATE, namespace: Namespace | None = None
) -> list[BlockKey]:
    one = call(body, api)
    texts = text_of(one)
    assert texts is not None
    return text_chain(texts[0], one, namespace)


def common(one: list[BlockKey], other: list[BlockKey]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


@given(st.binary(max_size=4 * CHUNK), st.binary(max_size=2 * CHUNK), st.binary(max_size=2 * CHUNK))
def test_text_keys_are_equal_exactly_as_far_as_the_texts(shared: bytes, one: bytes, other: bytes) -> None:
    any_call = call({"text": "x"})
    ours, theirs = text_chain(shared + one, any_call, None), text_chain(shared + other, any_call, None)
    assert len(ours) == len(shared + one) // CHUNK
    assert all(len(key) == KEY_BYTES for key in ours)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        end = (i + 1) * CHUNK
        assert (a == b) == ((shared + one)[:end] == (shared + other)[:end])


def test_next_turn_of_a_chat_has_the_text_keys_of_the_last() -> None:
    first = [{"role": "system", "content": LONG}, {"role": "user", "content": "hello"}]
    second = [*first, {"role": "assistant", "content": "hi"}, {"role": "user", "content": LONG}]
    one, other = (chain({"messages": messages}, Api.CHAT) for messages in (first, second))
    assert common(one, other) == len(one) > 0
    assert len(other) > len(one)


@pytest.mark.parametrize(
    ("body", "other", "api"),
    [
        ({"text": LONG}, {"text": LONG, "lora_path": "a"}, Api.GENERATE),
        ({"prompt": LONG}, {"prompt": LONG, "suffix": "a"}, Api.COMPLETIONS),
        (
            {"messages": [{"role": "user", "content": LONG}]},
            {
                "messages": [{"role": "user", "content": LONG}],
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
            Api.CHAT,
        ),
    ],
)
def test_field_that_changes_the_prompts_beginning_changes_every_text_key(
    body: dict[str, Any], other: dict[str, Any], api: Api
) -> None:
    assert common(chain(body, api), chain(other, api)) == 0


def test_namespaces_share_no_text_key() -> None:
    namespaces = [None, Namespace(None, "salt"), Namespace("salt", None), Namespace("", None)]
    chains = [chain({"text": LONG}, namespace=one) for one in namespaces]
    assert len({keys[0] for keys in chains}) == len(chains)


@pytest.mark.parametrize(
    ("body", "api"),
    [
        ({"input_ids": [1, 2]}, Api.GENERATE),
        ({"prompt": [1, 2]}, Api.COMPLETIONS),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, Api.CHAT),
    ],
)
def test_request_with_more_or_less_than_text_has_no_text_keys(body: dict[str, Any], api: Api) -> None:
    assert text_of(call(body, api)) is None


def test_chat_with_text_parts_has_text_keys() -> None:
    parts = [{"type": "text", "text": LONG}]
    assert text_of(call({"messages": [{"role": "user", "content": parts}]}, Api.CHAT)) is not None
