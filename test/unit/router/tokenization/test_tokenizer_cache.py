"""The encoder's cache of pieces never changes the ids of a text."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from memserve.router.tokenization.chat_messages import Chat
from memserve.router.tokenization.chat_template import ChatTemplate
from memserve.router.tokenization.token_encoder import Encoder

from .token_harness import CHATML, CORPUS, MODELS, byte_level, framed

TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im",
    "|>",
    "a|>b",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<think>",
    "<tool_call>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|eot_id|>",
    "<|user|>",
    "<|end|>",
]
WORDS = [
    "Hello",
    " world",
    "  ",
    "\n\n",
    "it's",
    "123456",
    "cafe\u0301",
    "<think>\u0338",  # composed, its last character is no ">": this is no token
    "日本",
    "🙂",
    "▁",
    "<",
    "|",
    ">",
    "a",
    "b",
]
TEXTS = st.lists(st.sampled_from(TOKENS + WORDS) | st.text(max_size=5), max_size=12).map("".join)
SMALL_CACHE = 8 * 64


@cache
def backend(model: str) -> Backend:
    """The reference tokenizer; each encoder has its own."""
    return MODELS[model]()[0]


@cache
def encoder(model: str, cache_tokens: int) -> Encoder:
    return Encoder(Backend.from_str(backend(model).to_str()), cache_tokens=cache_tokens)


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), framed=st.booleans())
def test_cached_encoding_of_any_texts_equals_the_whole(model: str, texts: list[str], framed: bool) -> None:
    for text in [*texts, *texts, "".join(texts)]:
        expected = backend(model).encode(text, add_special_tokens=framed).ids
        for cache_tokens in (0, SMALL_CACHE, 1 << 20):
            assert (
                encoder(model, cache_tokens).encode(text, add_special_tokens=framed).ids.tolist() == expected
            )


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=50, deadline=None)
@given(contents=st.lists(TEXTS, min_size=1, max_size=8))
def test_cached_encoding_of_a_growing_history_equals_the_whole(model: str, contents: list[str]) -> None:
    template = ChatTemplate(CHATML, {})
    messages: list[dict[str, object]] = []
    for number, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
        text = template.render(Chat(messages, None, {}, None)).text
        expected = backend(model).encode(text, add_special_tokens=False).ids
        assert encoder(model, 1 << 20).encode(text, add_special_tokens=False).ids.tolist() == expected


def test_encoder_counts_tokens_of_cached_pieces() -> None:
    encoder = Encoder(byte_level("<|im_end|>"))
    first = encoder.encode("one<|im_end|>two", add_special_tokens=False)
    second = encoder.encode("one<|im_end|>three", add_special_tokens=False)
    assert first.cached == 0
    assert second.cached == len(encoder.encode("one", add_special_tokens=False).ids)


def test_changing_an_encoded_result_leaves_the_cache_unchanged() -> None:
    encoder = Encoder(byte_level("<|im_end|>"))
    for _ in range(2):
        encoded = encoder.encode("one", add_special_tokens=False)
        expected = encoded.ids.tolist()
        encoded.ids.append(0)
        assert encoder.encode("one", add_special_tokens=False).ids.tolist() == expected


def test_full_cache_drops_the_least_recently_used_piece() -> None:
    encoder = Encoder(byte_level("<|im_end|>"), cache_tokens=400)  # room for ten short pieces
    encoder.encode("kept", add_special_tokens=False)
    for number in range(30):
        encoder.encode(f"other {number}", add_special_tokens=False)
        assert encoder.encode("kept", add_special_tokens=False).cached
    assert not encoder.encode("other 0", add_special_tokens=False).cached
    assert encoder.encode("other 29", add_special_tokens=False).cached


def test_piece_that_would_fill_the_cache_is_not_kept() -> None:
    encoder = Encoder(byte_level("<|im_end|>"), cache_tokens=400)
    for _ in range(2):
        assert not encoder.encode("".join(CORPUS), add_special_tokens=False).cached


def test_added_token_that_looks_around_forbids_splitting() -> None:
    encoder = Encoder(byte_level("<|im_end|>", AddedToken("<|user|>", rstrip=True)))
    encoder.encode("one<|im_end|>two", add_special_tokens=False)
    assert encoder.encode("one<|im_end|>three", add_special_tokens=False).cached == 0
    assert encoder.encode("one<|im_end|>two", add_special_tokens=False).cached


def test_special_tokens_stand_around_cached_pieces() -> None:
    backend = framed(byte_level("<s>", "</s>", "<|im_end|>"), "<s> $A </s>", "<s>", "</s>")
    first, last = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    encoder = Encoder(backend)
    bare = encoder.encode("one<|im_end|>two", add_special_tokens=False).ids.tolist()
    encoded = encoder.encode("one<|im_end|>two", add_special_tokens=True)
    assert encoded.ids.tolist() == [first, *bare, last]
    assert encoded.cached == len(bare) - 1
