"""History evicted from the radix cache is loaded from DRAM, bit for bit, and a flush drops it."""

from __future__ import annotations

from typing import Any

import requests

from memserve.testing.pool_reports import pool_reports

from .conftest import REQUEST_TIMEOUT_S, SMALL_HBM_TOKENS, Pair

PAGE = 16
PROMPT_TOKENS = 500
NUM_PROMPTS = SMALL_HBM_TOKENS // PROMPT_TOKENS * 2


def dram_stats(pair: Pair) -> dict[str, int]:
    """The statistics of prefill's pool."""
    workers = requests.get(f"{pair.url}/workers", timeout=REQUEST_TIMEOUT_S).json()["workers"]
    (report,) = pool_reports([worker["url"] for worker in workers if worker["role"] == "prefill"])
    stats: dict[str, int] = report["pool"]
    return stats


def ask(pair: Pair, prompt: int) -> Any:
    text = (f"{prompt:02}: " + "what a long story this is, told again. " * 20)[:PROMPT_TOKENS]
    return pair.generate(text=text, sampling_params={"max_new_tokens": 12})


def test_blocks_evicted_from_hbm_are_found_in_dram(expendable_pair: Pair) -> None:
    pair = expendable_pair
    pair.flush()
    before = dram_stats(pair)
    assert before["cached"] == 0

    cold = [ask(pair, prompt) for prompt in range(NUM_PROMPTS)]
    assert [answer["meta_info"]["prefill_cached_tokens"] for answer in cold] == [0] * NUM_PROMPTS
    warm = [ask(pair, prompt) for prompt in range(NUM_PROMPTS)]
    cached = (PROMPT_TOKENS - 1) // PAGE * PAGE
    assert [answer["meta_info"]["prefill_cached_tokens"] for answer in warm] == [cached] * NUM_PROMPTS
    assert [answer["output_ids"] for answer in warm] == [answer["output_ids"] for answer in cold]

    after = dram_stats(pair)
    # HBM holds half of it at most, so at least half came from DRAM.
    assert after["hits"] - before["hits"] >= NUM_PROMPTS // 2 * (cached // PAGE)
    assert after["corruptions"] == 0
    assert after["private"] == after["reserved"] == after["leases"] == 0

    pair.flush()
    assert dram_stats(pair)["cached"] == 0
    assert ask(pair, 0)["meta_info"]["prefill_cached_tokens"] == 0
