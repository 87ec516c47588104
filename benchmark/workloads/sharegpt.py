"""Conversations as in ShareGPT: most have several turns, each with everything before it in its prompt.

Published (MemServe): 73% of conversations have several turns, 5.75 turns in the mean, prompts of 4 to
2,300 tokens. The mean is taken over all conversations, those of one turn included: it gives 7.5 turns to
those of several, drawn as 2 and a geometric number. LMSYS-Chat-1M's table of datasets has ShareGPT at
94.5 tokens a prompt and 348.2 an answer; 5.75 such turns do not fit into 2,300 tokens. Sizes are drawn
at those means with a heavy tail, and a conversation whose last prompt would be longer than 2,300 has all
of its sizes made smaller alike: turns and lengths are kept, the mean sizes of long conversations are not.

A conversation also ends where `max_context` is reached. Below 2,400 times `scale` tokens that takes the
turns of long conversations: the mean falls, which the statistics show. So does cutting the last one off,
if there are few.
"""

from __future__ import annotations

from math import log

from load.records import Session, Turn, Workload
from workloads.draws import Draws
from workloads.settings import Settings
from workloads.statistics import Published

MULTI_TURN = 0.73
TURNS_MEAN = 5.75
MIN_PROMPT, MAX_PROMPT = 4, 2300
PROMPT_MEAN, PROMPT_SIGMA = 94.5, 1.1
OUTPUT_MEAN, OUTPUT_SIGMA = 348.2, 0.9
MEMSERVE = "MemServe"
LMSYS = "LMSYS-Chat-1M, table of datasets; 2,300 tokens leave less"


def make(settings: Settings) -> Workload:
    """Conversations, `grows=True`."""
    sessions: list[Session] = []
    left = settings.requests
    while left > 0:
        name = f"sharegpt-{settings.seed}-{len(sessions)}"
        turns = _turns(Draws(name), settings)[:left]
        sessions.append(Session(name, turns))
        left -= len(turns)
    return Workload("sharegpt", tuple(sessions))


def published(settings: Settings) -> tuple[Published, ...]:
    return (
        Published("turns_mean", TURNS_MEAN, MEMSERVE),
        Published("multi_turn", MULTI_TURN, MEMSERVE),
        Published("prompt_min", settings.prompt(MIN_PROMPT), MEMSERVE),
        Published("prompt_max", settings.prompt(MAX_PROMPT), MEMSERVE),
        Published("new_mean", PROMPT_MEAN * settings.scale, LMSYS),
        Published("output_mean", OUTPUT_MEAN * settings.answer_scale, LMSYS),
    )


def _turns(draws: Draws, settings: Settings) -> tuple[Turn, ...]:
    """At least one."""
    sizes = fitted(
        [
            (draws.lognormal(PROMPT_MEAN, PROMPT_SIGMA), draws.lognormal(OUTPUT_MEAN, OUTPUT_SIGMA))
            for _ in range(num_turns(draws))
        ]
    )
    turns: list[Turn] = []
    history = 0
    for new, answer in sizes:
        num_new, num_output = settings.prompt(new), settings.output(answer)
        room = settings.max_context - history
        if num_new + num_output > room:
            if turns:
                break
            num_output = min(num_output, max(settings.min_output, room // 2))
            num_new = min(num_new, room - num_output)
        turns.append(Turn(draws.tokens(num_new, settings.vocabulary), num_output))
        history += num_new + num_output
    return tuple(turns)


def num_turns(draws: Draws) -> int:
    """Of one conversation."""
    if draws.random.random() >= MULTI_TURN:
        return 1
    further = (TURNS_MEAN - (1 - MULTI_TURN)) / MULTI_TURN - 2
    return 2 + int(log(1 - draws.random.random()) / log(further / (1 + further)))


def fitted(sizes: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Prompts and answers, in published tokens, such that the last prompt has no more than MAX_PROMPT."""
    last = sum(new + answer for new, answer in sizes) - sizes[-1][1]
    shrink = min(1.0, MAX_PROMPT / last)
    return [(max(MIN_PROMPT, new * shrink), answer * shrink) for new, answer in sizes]
