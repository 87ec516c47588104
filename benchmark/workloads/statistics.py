"""Statistics of a workload, beside the published ones of its original.

Counts answers as long as they were asked for; knows nothing of servers.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from load.records import Session, Workload

PAGE_TOKENS = 16

UNITS = {
    "requests": "",
    "sessions": "",
    "turns_mean": "per session",
    "multi_turn": "of sessions",
    "prompt_mean": "tokens",
    "prompt_sd": "tokens",
    "prompt_min": "tokens",
    "prompt_max": "tokens",
    "new_mean": "tokens, past the history",
    "output_mean": "tokens",
    "shared": "of prompt tokens, in two prompts or more",
    "reusable": "of prompt tokens, had one cache everything before",
}
SHARES = ("multi_turn", "shared", "reusable")


@dataclass(frozen=True, slots=True)
class Published:
    """One figure to compare with, already in tokens of this scale."""

    statistic: str
    """A key of UNITS."""
    value: float
    source: str


def statistics_of(workload: Workload, page_tokens: int = PAGE_TOKENS) -> dict[str, float]:
    """A figure for each key of UNITS. Raises ValueError if there is no request.

    Whole pages count as shared or reusable. The last token of a prompt is always computed, the last of
    an answer never is, so neither is reused.
    """
    if not workload.num_requests:
        raise ValueError("a workload without requests has no statistics")
    turns = [len(session.turns) for session in workload.sessions]
    pages = _Pages(page_tokens)
    lengths: list[int] = []
    reused = 0
    for session in workload.sessions:
        for prompt, num_output in _prompts(session):
            lengths.append(len(prompt))
            reused += pages.ask(prompt)
            if session.grows:
                pages.keep(prompt + pages.answer(num_output - 1))
    new = [len(turn.new_tokens) for session in workload.sessions for turn in session.turns]
    outputs = [turn.num_output for session in workload.sessions for turn in session.turns]
    return {
        "requests": len(lengths),
        "sessions": len(turns),
        "turns_mean": statistics.fmean(turns),
        "multi_turn": sum(count > 1 for count in turns) / len(turns),
        "prompt_mean": statistics.fmean(lengths),
        "prompt_sd": statistics.pstdev(lengths),
        "prompt_min": min(lengths),
        "prompt_max": max(lengths),
        "new_mean": statistics.fmean(new),
        "output_mean": statistics.fmean(outputs),
        "shared": pages.num_shared_tokens / sum(lengths),
        "reusable": reused / sum(lengths),
    }


def table(name: str, figures: dict[str, float], published: Sequence[Published]) -> str:
    """Text: a line for each figure, with what was published of it and how far off this is."""
    beside = {one.statistic: one for one in published}
    lines = [f"{name:<12}{'here':>10}{'published':>11}{'off by':>8}"]
    for statistic, value in figures.items():
        line = f"{statistic:<12}{_written(statistic, value):>10}"
        if one := beside.get(statistic):
            off = f"{value / one.value - 1:+.0%}" if one.value else ""
            line += f"{_written(statistic, one.value):>11}{off:>8}  {one.source}"
        else:
            line += f"{'':>19}  {UNITS[statistic]}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def compared(figures: dict[str, float], published: Sequence[Published]) -> dict[str, dict[str, float | str]]:
    """The same for a report: per statistic `value`, `unit` and, where published, `published`, `deviation`
    (value over published, less 1) and `source`."""
    rows: dict[str, dict[str, float | str]] = {
        statistic: {"value": value, "unit": UNITS[statistic]} for statistic, value in figures.items()
    }
    for one in published:
        row: dict[str, float | str] = {"published": one.value, "source": one.source}
        if one.value:
            row["deviation"] = figures[one.statistic] / one.value - 1
        rows[one.statistic].update(row)
    return rows


def _written(statistic: str, value: float) -> str:
    if statistic in SHARES:
        return f"{value:.1%}"
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:,.2f}"


def _prompts(session: Session) -> Iterator[tuple[tuple[int, ...], int]]:
    """Each request's prompt and answer's length. Answers are ids that no vocabulary has."""
    history: tuple[int, ...] = ()
    for number, turn in enumerate(session.turns):
        prompt = history + turn.new_tokens
        yield prompt, turn.num_output
        if session.grows and number + 1 < len(session.turns):
            history = prompt + _Pages.answer(turn.num_output)


class _Pages:
    """An unbounded cache: the pages seen, and the number of prompts with each."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._ids: dict[tuple[int, tuple[int, ...]], int] = {}
        """By the page before it and its tokens."""
        self._asked: Counter[int] = Counter()

    @staticmethod
    def answer(num_tokens: int) -> tuple[int, ...]:
        """What was generated; what it follows tells it from others."""
        return (-1,) * num_tokens

    def ask(self, prompt: tuple[int, ...]) -> int:
        """Note a prompt's pages; how many of its tokens need not be computed."""
        known = len(self._ids)
        path = self.keep(prompt)
        self._asked.update(path)
        hit = sum(page <= known for page in path)
        return min(hit * self._page_tokens, len(prompt) - 1) // self._page_tokens * self._page_tokens

    def keep(self, tokens: tuple[int, ...]) -> list[int]:
        """The ids of the whole pages of `tokens`, from 1, in order of first sight."""
        path: list[int] = []
        page = 0
        for start in range(0, len(tokens) - self._page_tokens + 1, self._page_tokens):
            key = (page, tokens[start : start + self._page_tokens])
            page = self._ids.setdefault(key, len(self._ids) + 1)
            path.append(page)
        return path

    @property
    def num_shared_tokens(self) -> int:
        """Of all prompts, those in a page that several prompts have."""
        return sum(count for count in self._asked.values() if count > 1) * self._page_tokens
