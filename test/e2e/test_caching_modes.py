"""The paper's four caching steps, each by its closed form: the tokens computed and the pages moved.

A conversation of six turns; n tokens of prompt, g of answer, the last of which has no KV.

    mode      computed by prefill         prefill to decode          decode to prefill
    none      n                           pages(n)                   0
    prefill   n - what prefill computed   pages(n)                   0
    both      the same                    pages(n) - decode's own    0
    full      n - what either computed    pages(n) - decode's own    what prefill lacks

Source: MemServe, section on caching steps, in whole pages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memserve.core.caching import CachingMode
from memserve.testing.pool_reports import exchanged_bytes, pool_reports, wait_settled
from memserve.wire.messages import Role

from .conftest import SMALL_HBM_TOKENS, NewCluster, Pair
from .geometry import PAGE, full_pages, page_bytes, pages

NUM_TURNS = 6
NEW_TOKENS = 50
FILLER_TOKENS = 500
WORDS = [
    "Tell me about the sea. " * 5,
    " And then? ",
    " What about the ships, the islands, and the long way home? ",
    " I see. ",
    " But who was on the last of them when it came into the harbour of the old town? ",
    " Thank you. ",
]


@dataclass(frozen=True)
class Turn:
    """The cost of one turn: tokens, and whole pages."""

    computed: int
    to_decode: int
    to_prefill: int


def expected(mode: CachingMode, prompts: list[int]) -> list[Turn]:
    """The closed forms. `prompts`: tokens of each turn's whole prompt."""
    turns = []
    at_prefill, at_decode = 0, 0
    for prompt in prompts:
        reused = min(at_prefill, (prompt - 1) // PAGE)
        held = full_pages(prompt + NEW_TOKENS - 1)
        to_prefill = held - full_pages(prompt) if mode.returns else 0
        turns.append(Turn(prompt - reused * PAGE, pages(prompt) - at_decode, to_prefill))
        if mode.prefill_keeps:
            at_prefill = held if mode.returns else full_pages(prompt)
        if mode.decode_keeps:
            at_decode = held
    return turns


def converse(
    pair: Pair, between: Callable[[], None] = lambda: None
) -> tuple[list[int], list[Turn], list[list[int]]]:
    """Six turns: tokens of each prompt, the cost of each, and the answered tokens."""
    page = page_bytes(pair.model)
    history, prompts, turns, outputs = "", [], [], []
    for words in WORDS:
        history += words
        between()
        moved, home = pair.moved_bytes(), exchanged_bytes(pool_reports(pair.server_urls()))
        answer: Any = pair.generate(text=history, sampling_params={"max_new_tokens": NEW_TOKENS})
        wait_settled(pair.server_urls())
        meta = answer["meta_info"]
        prompts.append(meta["prompt_tokens"])
        to_decode, record = divmod(pair.moved_bytes() - moved, page)
        assert record < page // 2, "beside the pages goes one small record"
        to_prefill, rest = divmod(exchanged_bytes(pool_reports(pair.server_urls())) - home, page)
        assert rest == 0
        computed = meta["prompt_tokens"] - meta["prefill_cached_tokens"]
        turns.append(Turn(computed, to_decode, to_prefill))
        outputs.append(answer["output_ids"])
        history += answer["text"]
    return prompts, turns, outputs


@pytest.fixture(scope="module", params=[CachingMode.NONE, CachingMode.PREFILL, CachingMode.BOTH], ids=str)
def other_pair(
    request: pytest.FixtureRequest, tiny_model: Path, new_cluster: NewCluster
) -> Iterator[tuple[CachingMode, Pair]]:
    mode = request.param
    with new_cluster(f"caching-{mode}") as cluster:
        pair = Pair(cluster, tiny_model, ("--caching", str(mode)))
        pair.launch(Role.PREFILL)
        pair.launch(Role.DECODE)
        cluster.wait_ready()
        pair.wait_pair()
        yield mode, pair


@pytest.fixture(scope="module")
def in_full(pair: Pair) -> tuple[list[int], list[Turn], list[list[int]]]:
    """The conversation in mode `full`, which is the default."""
    pair.flush()
    return converse(pair)


def test_mode_full_costs_its_closed_form(in_full: tuple[list[int], list[Turn], list[list[int]]]) -> None:
    prompts, turns, _ = in_full
    assert len(turns) == NUM_TURNS
    assert turns == expected(CachingMode.FULL, prompts)
    assert any(turn.to_prefill for turn in turns)


def test_history_in_dram_costs_no_more_than_in_hbm(
    expendable_pair: Pair, in_full: tuple[list[int], list[Turn], list[list[int]]]
) -> None:
    """Between the turns, other prompts fill all of prefill's HBM."""
    pair, fillers = expendable_pair, itertools.count()
    pair.flush()

    def fill() -> None:
        for _ in range(SMALL_HBM_TOKENS // FILLER_TOKENS + 1):
            text = f"{next(fillers):04}" + "x" * (FILLER_TOKENS - 5)
            pair.generate(text=text, sampling_params={"max_new_tokens": 1})
        wait_settled(pair.server_urls())

    loaded = loaded_blocks(pair)
    prompts, turns, outputs = converse(pair, fill)
    assert turns == expected(CachingMode.FULL, prompts)
    assert (prompts, outputs) == (in_full[0], in_full[2])
    reused = sum(prompt - turn.computed for prompt, turn in zip(prompts, turns, strict=True))
    assert loaded_blocks(pair) - loaded == reused // PAGE, "none of it was in HBM any more"


def loaded_blocks(pair: Pair) -> int:
    return sum(report["linker"]["loaded_blocks"] for report in pool_reports(pair.server_urls()))


def test_each_caching_mode_costs_its_closed_form_and_answers_the_same(
    other_pair: tuple[CachingMode, Pair], in_full: tuple[list[int], list[Turn], list[list[int]]]
) -> None:
    mode, pair = other_pair
    prompts, turns, outputs = converse(pair)
    assert turns == expected(mode, prompts)
    assert (prompts, outputs) == (in_full[0], in_full[2]), "greedy tokens do not depend on what is kept"
