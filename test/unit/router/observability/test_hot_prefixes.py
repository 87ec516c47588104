"""Shared prefixes are found, reported once, decay, and stay within bounds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from memserve.core.block_keys import page_keys
from memserve.router.observability.hot_prefixes import (
    MAX_NOTED,
    SAMPLE_CHARS,
    HotPrefixes,
    depths_of,
    sample_of,
)
from memserve.scheduling.context import Prompt

unique = itertools.count(1000)


def prompt(*parts: tuple[int, int], tail: int = 5) -> Prompt:
    """Of (what, how many blocks of it) in a row, and blocks that no other prompt has."""
    tokens = [what for what, blocks in parts for _ in range(blocks)]
    tokens += [next(unique) for _ in range(tail)]
    return Prompt(len(tokens), (page_keys(tokens, 1),))


def told(prefixes: HotPrefixes, now_s: float = 0.0) -> list[tuple[int, float]]:
    return [(one.blocks, round(one.weight, 2)) for one in prefixes.hottest(20, now_s)]


def seen(prompts: Sequence[Prompt], **settings: int) -> HotPrefixes:
    prefixes = HotPrefixes(0.0, **settings)
    for one in prompts:
        prefixes.note(one, None)
    prefixes.tick(0.0)
    return prefixes


def test_hottest_reports_a_shared_prefix_once_at_its_end() -> None:
    assert told(seen([prompt((7, 16)) for _ in range(10)])) == [(16, 10.0)]


def test_hottest_reports_both_branches_and_their_common_prefix() -> None:
    here, there = ([prompt((7, 8), (way, 8)) for _ in range(10)] for way in (1, 2))
    assert told(seen(here + there)) == [(8, 20.0), (16, 10.0), (16, 10.0)]


def test_reported_depth_is_at_most_a_third_too_short() -> None:
    for shared in range(1, 200):
        ((blocks, weight),) = told(seen([prompt((7, shared), tail=100) for _ in range(3)]))
        assert weight == 3
        assert shared * 2 / 3 <= blocks <= shared


def test_hottest_leaves_out_prompts_without_common_prefix() -> None:
    assert told(seen([prompt(tail=40) for _ in range(50)])) == []


def test_hot_prefixes_count_each_prompt_of_a_batch() -> None:
    one, two = prompt((7, 4)), prompt((7, 4))
    assert told(seen([Prompt(18, (*one.chains, *two.chains))])) == [(4, 2.0)]


def test_hot_prefix_weights_decay() -> None:
    half_life_s = 90
    prefixes = seen([prompt((7, 4)) for _ in range(8)], half_life_s=half_life_s)
    assert told(prefixes, half_life_s) == [(4, 4.0)]
    for _ in range(4):
        prefixes.note(prompt((9, 4)), None)
    prefixes.tick(2 * half_life_s)
    assert told(prefixes, 2 * half_life_s) == [(4, 4.0), (4, 2.0)]


def test_hot_prefix_weights_survive_weeks() -> None:
    prefixes = HotPrefixes(0.0)
    for hour in range(24 * 21):
        now_s = 3600.0 * hour
        for _ in range(3):
            prefixes.note(prompt((7, 4)), None)
        prefixes.tick(now_s)
        assert told(prefixes, now_s)[0] == (4, 3.0)


def test_unsampled_prompts_add_weight_to_the_sample() -> None:
    prefixes = seen([prompt((7, 4), tail=0) for _ in range(4 * MAX_NOTED)])
    assert told(prefixes) == [(4, 4.0 * MAX_NOTED)]


def test_hot_prefixes_drop_the_lightest_keys() -> None:
    prefixes = HotPrefixes(0.0, max_keys=64)
    for step in range(100):
        prefixes.note(prompt((7, 4)), None)
        for _ in range(20):
            prefixes.note(prompt(tail=20), None)
        prefixes.tick(step / 10)
        assert len(prefixes._seen) <= 2 * 64 + 21 * 9
    assert told(prefixes, 10.0)[0][0] == 4


def test_hot_prefixes_keep_samples_only_if_enabled() -> None:
    for keeps, expected in ((False, None), (True, "hello")):
        prefixes = HotPrefixes(0.0, keeps_samples=keeps)
        for _ in range(3):
            prefixes.note(prompt((7, 4)), prefixes.sample({"text": "hello"}))
        prefixes.tick(0.0)
        assert prefixes.hottest(1, 0.0)[0].sample == expected


@pytest.mark.parametrize(
    ("body", "sample"),
    [
        ({"text": "x" * 1000}, "x" * SAMPLE_CHARS),
        ({"text": ["one", "two"]}, "one"),
        ({"prompt": "one"}, "one"),
        ({"prompt": [1, 2]}, None),
        ({"input_ids": [1]}, None),
        ({"messages": [{"role": "system", "content": "be good"}]}, "system: be good"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, "user: hi"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"messages": [5]}, None),
        ({"messages": []}, None),
        ({}, None),
    ],
)
def test_sample_is_the_beginning_of_the_first_text(body: dict[str, object], sample: str | None) -> None:
    assert sample_of(body) == sample


def test_depths_double_in_two_steps() -> None:
    assert list(depths_of(13)) == [1, 2, 3, 4, 6, 8, 12]
    assert list(depths_of(0)) == []
