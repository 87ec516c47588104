"""Prompts of one turn that nothing shares: what caching costs where it cannot help.

Sizes are ours, of no dataset: 500 to 1,500 tokens in, 128 out.
"""

from __future__ import annotations

from load.records import Session, Turn, Workload
from workloads.draws import Draws
from workloads.settings import Settings
from workloads.statistics import Published

PROMPT_MIN, PROMPT_MAX = 500, 1500
OUTPUT = 128


def make(settings: Settings) -> Workload:
    """Sessions of one request each."""
    num_output = min(settings.output(OUTPUT), max(settings.min_output, settings.max_context // 2))

    def session(number: int) -> Session:
        name = f"random-{settings.seed}-{number}"
        draws = Draws(name)
        size = settings.prompt(draws.random.uniform(PROMPT_MIN, PROMPT_MAX))
        tokens = draws.tokens(min(size, settings.max_context - num_output), settings.vocabulary)
        return Session(name, (Turn(tokens, num_output),), grows=False)

    return Workload("random", tuple(session(number) for number in range(settings.requests)))


def published(settings: Settings) -> tuple[Published, ...]:
    return (
        Published("prompt_mean", (PROMPT_MIN + PROMPT_MAX) / 2 * settings.scale, "ours"),
        Published("output_mean", settings.output(OUTPUT), "ours"),
        Published("shared", 0, "on purpose"),
    )
