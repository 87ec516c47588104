"""The settings of a workload: number of requests, scale of tokens, seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memserve.core.errors import ConfigError
from memserve.simulation.traces import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Settings:
    """Checked when built: ConfigError names the setting to change."""

    requests: int = 40
    """Number of requests. Sessions are made until there are enough; the last is truncated."""
    seed: int = 0
    """Of all random draws. Another seed shares no token with this one, of a trace neither."""
    scale: float = 1.0
    """Tokens of a prompt here for one published."""
    output_scale: float | None = None
    """Tokens of an answer here for one published; None: `scale`."""
    max_context: int = 32_768
    """Tokens that a prompt and its answer never exceed."""
    min_output: int = 2
    """Tokens of an answer at least; with one token there is no time between tokens."""
    vocabulary: tuple[int, int] = (10, 250)
    """First id, and the one past the last. Those of the bench model that are plain characters."""
    questions: int = 18
    """loogle: questions per document, over all its sessions."""
    share_ratio: int = 3
    """loogle: sessions per document."""
    trace: Path | None = None
    """trace: the file."""
    block_tokens: int = BLOCK_TOKENS
    """trace: tokens per hash id in the file."""

    def __post_init__(self) -> None:
        for name in ("requests", "min_output", "questions", "share_ratio", "block_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: give at least 1")
        for name, value in (("scale", self.scale), ("output_scale", self.answer_scale)):
            if not 0 < value <= 100:
                raise ConfigError(f"{name} is {value:g}: give more than 0 (0.25 is a quarter of the size)")
        if self.max_context <= self.min_output:
            raise ConfigError(
                f"max_context {self.max_context} has no room for a prompt and {self.min_output} tokens of "
                "answer: give more"
            )
        low, high = self.vocabulary
        if low < 0 or high - low < 2:
            raise ConfigError(
                f"vocabulary {low} to {high}: give a first id and, at least 2 further on, where it ends"
            )

    @property
    def answer_scale(self) -> float:
        return self.scale if self.output_scale is None else self.output_scale

    def output(self, tokens: float) -> int:
        """Tokens here of an answer of so many published ones."""
        return max(self.min_output, round(tokens * self.answer_scale))

    def prompt(self, tokens: float) -> int:
        """Tokens here of a piece of a prompt of so many published ones."""
        return max(1, round(tokens * self.scale))
