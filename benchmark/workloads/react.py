"""Agents as ReAct's on HotpotQA: all share a long prompt of examples; each step adds a tool's answer.

Published: six examples of about 940 words before each question (MemServe). The examples themselves
(ysymyth/ReAct, webthink_simple6) take 20 steps for 6 questions of 15.5 words, and a step's thought and
action 25.5 words; ReAct's notebook stops after 7 steps and an answer after 100 tokens. Assumed, without
a source: 1.3 tokens a word, and 80 words an observation: the environment (wikienv.py) returns the first
five sentences of a page, or one sentence for a lookup; the examples' were shortened to 21 words by hand.
"""

from __future__ import annotations

from load.records import Session, Turn, Workload
from workloads.draws import Draws
from workloads.settings import Settings
from workloads.statistics import Published

TOKENS_PER_WORD = 1.3
EXAMPLES = 940 * TOKENS_PER_WORD
QUESTION, QUESTION_SIGMA = 15.5 * TOKENS_PER_WORD, 0.4
STEP, STEP_SIGMA, STEP_MAX = 25.5 * TOKENS_PER_WORD, 0.4, 100
OBSERVATION, OBSERVATION_SIGMA = 80 * TOKENS_PER_WORD, 0.6
STEPS = {2: 0.20, 3: 0.50, 4: 0.16, 5: 0.08, 6: 0.04, 7: 0.02}
"""How likely a question takes so many steps: 3.32 in the mean. The shape is an assumption."""


def make(settings: Settings) -> Workload:
    """Questions, `grows=True`; a turn is a step."""
    shots = Draws("react", settings.seed, "examples").tokens(settings.prompt(EXAMPLES), settings.vocabulary)
    sessions: list[Session] = []
    left = settings.requests
    while left > 0:
        name = f"react-{settings.seed}-{len(sessions)}"
        turns = _turns(Draws(name), shots, settings)[:left]
        sessions.append(Session(name, turns))
        left -= len(turns)
    return Workload("react", tuple(sessions))


def published(settings: Settings) -> tuple[Published, ...]:
    shots = "ReAct's six examples: 20 steps, 25.5 words each"
    return (
        Published("turns_mean", 20 / 6, shots),
        Published("prompt_min", settings.prompt(EXAMPLES), "MemServe: ~940 words shared, and a question"),
        Published("output_mean", STEP * settings.answer_scale, shots),
    )


def _turns(draws: Draws, shots: tuple[int, ...], settings: Settings) -> tuple[Turn, ...]:
    """At least one: the examples lose their end if there is no room for them and a question."""
    steps = draws.random.choices(list(STEPS), list(STEPS.values()))[0]
    turns: list[Turn] = []
    history = 0
    for step in range(steps):
        num_output = settings.output(min(draws.lognormal(STEP, STEP_SIGMA), STEP_MAX))
        if step == 0:
            num_output = min(num_output, settings.max_context - 1)
            room = settings.max_context - num_output
            num_question = min(settings.prompt(draws.lognormal(QUESTION, QUESTION_SIGMA)), room)
            question = draws.tokens(num_question, settings.vocabulary)
            new = shots[: room - num_question] + question
        else:
            size = settings.prompt(draws.lognormal(OBSERVATION, OBSERVATION_SIGMA))
            new = draws.tokens(size, settings.vocabulary)
        if history + len(new) + num_output > settings.max_context:
            break
        turns.append(Turn(new, num_output))
        history += len(new) + num_output
    return tuple(turns)
