"""Questions about long documents as in LooGLE: most of a prompt is the document, the answer is short.

Published (MemServe): prompts of 23,500 tokens (standard deviation 6,100), 16 tokens of answer, 91% of a
prompt shared, about 18 questions a document; in its scheduling experiment three sessions ask about each.
A document's first question has it to itself, so an ideal cache gives 91% * (n - 1) / n of all tokens with
n questions a document: 86% with 18, 80% with 8, 68% with 4. Few requests are few documents: 40 with 18
questions each are 3 documents; `questions=8` makes them 5.

Lengths are drawn one from each n-th part of the normal distribution, so that few documents are as long
as many in the mean.

A prompt longer than `max_context` loses from the document's end, never from the question.
"""

from __future__ import annotations

from statistics import NormalDist

from load.records import Session, Turn, Workload
from workloads.draws import Draws
from workloads.settings import Settings
from workloads.statistics import Published

PROMPT_MEAN, PROMPT_SD, PROMPT_MIN = 23_500, 6_100, 2_000
LENGTHS = NormalDist(PROMPT_MEAN, PROMPT_SD)
SHARED = 0.91
QUESTIONS = 18
OUTPUT = 16
QUESTION_SPREAD = 0.2
"""How far from its mean a question's length goes. An assumption."""
MEMSERVE = "MemServe"


def make(settings: Settings) -> Workload:
    """Sessions that ask about one document each, `grows=False`, those of all documents mixed.

    Each document is asked about equally often, give or take one.
    """
    num_documents = -(-settings.requests // settings.questions)
    sessions: list[Session] = []
    for number in range(num_documents):
        first = settings.requests * number // num_documents
        questions = settings.requests * (number + 1) // num_documents - first
        draws = Draws("loogle", settings.seed, number)
        length = LENGTHS.inv_cdf((number + draws.random.uniform(0.01, 0.99)) / num_documents)
        sessions += _document(f"loogle-{settings.seed}-{number}", length, questions, draws, settings)
    Draws("loogle", settings.seed, "order").random.shuffle(sessions)
    return Workload("loogle", tuple(sessions))


def published(settings: Settings) -> tuple[Published, ...]:
    return (
        Published("prompt_mean", PROMPT_MEAN * settings.scale, MEMSERVE),
        Published("prompt_sd", PROMPT_SD * settings.scale, MEMSERVE),
        Published("output_mean", settings.output(OUTPUT), MEMSERVE),
        Published("shared", SHARED, MEMSERVE),
        Published("reusable", SHARED * (QUESTIONS - 1) / QUESTIONS, "from MemServe's 91% and 18 questions"),
    )


def _document(name: str, length: float, questions: int, draws: Draws, settings: Settings) -> list[Session]:
    """The sessions about one document; `length` is of its prompts, in published tokens."""
    length = max(PROMPT_MIN, length)
    document = draws.tokens(settings.prompt(length * SHARED), settings.vocabulary)
    num_output = min(settings.output(OUTPUT), settings.max_context - 1)

    def ask() -> Turn:
        spread = draws.random.uniform(1 - QUESTION_SPREAD, 1 + QUESTION_SPREAD)
        room = settings.max_context - num_output
        question = draws.tokens(
            min(settings.prompt(length * (1 - SHARED) * spread), room), settings.vocabulary
        )
        return Turn(document[: room - len(question)] + question, num_output)

    asked = [ask() for _ in range(questions)]
    askers = min(settings.share_ratio, questions)
    return [Session(f"{name}-{asker}", tuple(asked[asker::askers]), grows=False) for asker in range(askers)]
