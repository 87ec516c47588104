"""What a second turn finds at prefill and at decode, and how many bytes it makes move."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import Pair

PAGE = 16
NEW_TOKENS = 50


def page_bytes(model: Path) -> int:
    """Bytes of one page of KV over all layers, in float32."""
    config = json.loads((model / "config.json").read_text())
    width = config["num_key_value_heads"] * config["head_dim"]
    return int(config["num_hidden_layers"] * 2 * PAGE * width * 4)


def full_pages(tokens: int) -> int:
    return tokens // PAGE


def pages(tokens: int) -> int:
    return -(-tokens // PAGE)


def test_a_second_turn_computes_and_moves_only_what_is_new(pair: Pair) -> None:
    pair.flush()
    page = page_bytes(pair.model)
    history, known_at_prefill, known_at_decode = "Tell me about the sea. " * 5, 0, 0
    overheads = set()
    for _ in range(4):
        before = pair.moved_bytes()
        answer = pair.generate(text=history, sampling_params={"max_new_tokens": NEW_TOKENS})
        moved = pair.moved_bytes() - before
        meta = answer["meta_info"]
        prompt = meta["prompt_tokens"]

        assert meta["prefill_cached_tokens"] == known_at_prefill * PAGE
        assert meta["cached_tokens"] == known_at_decode * PAGE
        lacking = pages(prompt) - known_at_decode
        overheads.add(moved - lacking * page)

        known_at_prefill = full_pages(prompt)
        # The last sampled token has no KV.
        known_at_decode = full_pages(prompt + NEW_TOKENS - 1)
        history += answer["text"] + " And then? "
    # Beside the pages goes one small, fixed record per request.
    assert len(overheads) == 1
    assert 0 <= overheads.pop() < page


def test_a_flush_forgets_on_both_sides(pair: Pair) -> None:
    prompt = "A prompt that is long enough for a few pages of KV, sent twice."
    pair.generate(text=prompt, sampling_params={"max_new_tokens": 1})
    pair.flush()
    meta = pair.generate(text=prompt, sampling_params={"max_new_tokens": 1})["meta_info"]
    assert (meta["prefill_cached_tokens"], meta["cached_tokens"]) == (0, 0)
