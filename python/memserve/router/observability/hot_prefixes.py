"""Finds the prefixes that recent prompts share, in bounded memory and time.

    placed ──note──> a sample ──tick──> weights by key, at 1, 2, 3, 4, 6, 8, 12, 16 ... blocks of each prompt
    hottest: the prefixes whose prompts continue differently, or end; a prefix is left out if nearly all of
             its prompts share a longer one

Weights decay: after `half_life_s` a prompt counts half. If there are too many keys, the lightest are dropped,
so a prefix may lack the weight of its first prompts. Knows no instances, and of texts only the given sample.
Event loop thread only; the time is passed in.
Source: the bound is that of Manku and Motwani's lossy counting, with fading weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from memserve.core.block_keys import BlockKey
from memserve.router.records import HotPrefix
from memserve.router.request import JsonObject
from memserve.scheduling.context import Prompt

MAX_NOTED = 256
"""Prompts sampled per tick; the others only add weight to the sample."""
MAX_OF_BATCH = 16
"""Prompts counted of one request's list."""
EXPLAINED = 0.9
"""A prefix is left out if one longer prefix has this share of its weight."""
MIN_WEIGHT = 1.5
"""Excludes prefixes of a single prompt."""
MAX_GROWTH = 2.0**64
SAMPLE_CHARS = 120


class _Seen(msgspec.Struct):
    blocks: int
    parent: BlockKey | None
    by_text: bool
    weight: float = 0.0
    sample: str | None = None


class HotPrefixes:
    """The weights. See the module."""

    def __init__(
        self,
        now_s: float,
        *,
        keeps_samples: bool = False,
        max_keys: int = 4096,
        half_life_s: float = 60.0,
    ) -> None:
        """`keeps_samples`: keep the beginning of one prompt per prefix."""
        self.keeps_samples = keeps_samples
        self._max_keys = max_keys
        self._half_life_s = half_life_s
        self._seen: dict[BlockKey, _Seen] = {}
        self._noted: list[tuple[Prompt, str | None]] = []
        self._num_noted = 0
        self._origin_s = now_s
        """Weights are relative to this time: later prompts weigh more, so stored weights need no decay."""

    def sample(self, body: JsonObject) -> str | None:
        """The beginning of the text of a request, if samples are kept."""
        return sample_of(body) if self.keeps_samples else None

    def note(self, prompt: Prompt, sample: str | None) -> None:
        """Note a placed prompt that begins with `sample`; `tick` counts it."""
        self._num_noted += 1
        if len(self._noted) < MAX_NOTED:
            self._noted.append((prompt, sample))

    def tick(self, now_s: float) -> None:
        """Count the noted prompts: at most `MAX_NOTED`, some 20 keys each."""
        noted, self._noted = self._noted, []
        if noted:
            weight = self._growth(now_s) * self._num_noted / len(noted)
            for prompt, sample in noted:
                for chain in prompt.chains[:MAX_OF_BATCH]:
                    self._count(chain, prompt.by_text, weight, sample)
        self._num_noted = 0
        if len(self._seen) > 2 * self._max_keys:
            self._drop_lightest()

    def hottest(self, num: int, now_s: float) -> list[HotPrefix]:
        """At most `num` prefixes, the heaviest first."""
        growth = self._growth(now_s)
        going_on: dict[BlockKey, float] = {}
        for one in self._seen.values():
            if one.parent is not None:
                going_on[one.parent] = max(going_on.get(one.parent, 0.0), one.weight)
        found = [
            HotPrefix(key, one.blocks, one.weight / growth, one.by_text, one.sample)
            for key, one in self._seen.items()
            if one.weight / growth >= MIN_WEIGHT and going_on.get(key, 0.0) < EXPLAINED * one.weight
        ]
        return sorted(found, key=lambda it: (-it.weight, -it.blocks))[:num]

    def _count(self, chain: Sequence[BlockKey], by_text: bool, weight: float, sample: str | None) -> None:
        parent = None
        for blocks in depths_of(len(chain)):
            key = chain[blocks - 1]
            one = self._seen.get(key)
            if one is None:
                one = self._seen[key] = _Seen(blocks, parent, by_text)
            one.weight += weight
            if one.sample is None:
                one.sample = sample
            parent = key

    def _growth(self, now_s: float) -> float:
        """The weight of a prompt now, relative to one at the origin. Moves the origin before it overflows."""
        growth: float = 2.0 ** ((now_s - self._origin_s) / self._half_life_s)
        if growth < MAX_GROWTH:
            return growth
        for one in self._seen.values():
            one.weight /= growth
        self._seen = {key: one for key, one in self._seen.items() if one.weight > 1 / MAX_GROWTH}
        self._origin_s = now_s
        return 1.0

    def _drop_lightest(self) -> None:
        heaviest = sorted(self._seen.items(), key=lambda it: (-it[1].weight, it[1].blocks))
        self._seen = dict(heaviest[: self._max_keys])


def depths_of(num_blocks: int) -> Iterator[int]:
    """The depths at which a prompt of `num_blocks` is counted: two per doubling."""
    power = 1
    while power <= num_blocks:
        yield power
        if power > 1 and (between := power + power // 2) <= num_blocks:
            yield between
        power *= 2


def sample_of(body: JsonObject) -> str | None:
    """The beginning of a request's text, first prompt or first message; None if it has token ids only."""
    for name in ("text", "prompt"):
        text = body.get(name)
        if isinstance(text, list) and text:
            text = text[0]
        if isinstance(text, str) and text:
            return text[:SAMPLE_CHARS]
    messages = body.get("messages")
    message = messages[0] if isinstance(messages, list) and messages else None
    if not isinstance(message, dict):
        return None
    content = message.get("content")
    if isinstance(content, list) and content and isinstance(content[0], dict):
        content = content[0].get("text")
    return f"{message.get('role')}: {content[:SAMPLE_CHARS]}" if isinstance(content, str) else None
