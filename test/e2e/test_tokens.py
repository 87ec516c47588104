"""Router, prefill and decode give the tokens that transformers computes on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import Pair

PAGE = 16
NEW_TOKENS = 40
# Lengths on both sides of page boundaries, and across many pages.
PROMPT_TOKENS = (3, 15, 16, 17, 31, 32, 33, 100, 250)
TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. " * 4


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> dict[int, list[int]]:
    """Greedy continuations by transformers, by prompt length."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = tokenizer(TEXT).input_ids
    continuations = {}
    for length in PROMPT_TOKENS:
        prompt = torch.tensor([ids[:length]])
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        continuations[length] = output[0, length:].tolist()
    return continuations


@pytest.fixture(scope="module")
def ids(tiny_model: Path) -> list[int]:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    result: list[int] = tokenizer(TEXT).input_ids
    return result


@pytest.mark.parametrize("transfer", ["local", "tcp"])
def test_greedy_tokens_equal_transformers_cold_and_warm(
    pairs: dict[str, Pair], transfer: str, ids: list[int], reference: dict[int, list[int]]
) -> None:
    pair = pairs[transfer]
    for length in PROMPT_TOKENS:
        pair.flush()
        for temperature in ("cold", "warm"):
            answer = pair.generate(input_ids=ids[:length], sampling_params={"max_new_tokens": NEW_TOKENS})
            assert answer["output_ids"] == reference[length], f"{length} tokens, {temperature}"
            cached = answer["meta_info"]["prefill_cached_tokens"]
            # The last token is always computed: sampling needs its logits.
            assert cached == (0 if temperature == "cold" else (length - 1) // PAGE * PAGE)


def test_pair_uses_the_requested_transport(pairs: dict[str, Pair]) -> None:
    for name, pair in pairs.items():
        pair.generate(text="hello", sampling_params={"max_new_tokens": 1})
        assert f"transport={name}" in pair.cluster.servers["prefill"].output()


def test_batch_gives_each_prompt_its_own_tokens(
    pair: Pair, ids: list[int], reference: dict[int, list[int]]
) -> None:
    prompts = [ids[:length] for length in PROMPT_TOKENS]
    answers = pair.generate(input_ids=prompts, sampling_params={"max_new_tokens": NEW_TOKENS})
    assert [answer["output_ids"] for answer in answers] == [reference[length] for length in PROMPT_TOKENS]
