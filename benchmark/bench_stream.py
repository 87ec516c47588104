"""Delay of a stream's tokens while prefill is idle, and while it is busy with the next prompt.

    python benchmark/bench_stream.py [--quick]

A question about a cached text goes to MemServe and to stock SGLang behind sglang-router, in turn. In
`busy`, a long new prompt follows as soon as prefill has the question: its computation should not delay
the question's answer.

    stream/busy/first_token       ms; baseline: stock SGLang with a radix cache at decode. Also idle/
    stream/busy/answer            ms to the last token; if it is the same, all tokens came at once

One minute; --quick half of that.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from random import Random

import aiohttp

from bench_model import make_model, random_tokens
from figures import progress, report
from load.client import Answer, Client
from systems.base import Setting, System
from systems.catalogue import SYSTEMS

OURS, THEIRS = "pd-caching-3", "stock-pd-decode-cache"
TEXT_TOKENS, QUESTION_TOKENS, OTHER_TOKENS = 1024, 64, 1024
ANSWER_TOKENS = 8
STATES = ("idle", "busy")
"""Of prefill."""
HEAD_START_S = 0.05
"""After the question: by then prefill computes it, or has computed it."""
ROUNDS, QUICK_ROUNDS = 20, 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = QUICK_ROUNDS if parser.parse_args().quick else ROUNDS
    with ExitStack() as stack:
        setting = Setting(make_model(), Path(tempfile.mkdtemp(prefix="memserve-stream-")))
        progress(f"starting {OURS} and {THEIRS} (logs in {setting.logs})")
        systems = [stack.enter_context(SYSTEMS[name].start(name, setting)) for name in (OURS, THEIRS)]
        for system in systems:
            system.wait_ready()
        measure(systems, rounds)


def measure(systems: list[System], rounds: int) -> None:
    """Idle and busy in turn, each system in turn; the first round only fills the caches."""
    draw = Random(1)
    text = random_tokens(draw, TEXT_TOKENS)
    times: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for nth in range(rounds + 1):
        for state in STATES:
            question = text + random_tokens(draw, QUESTION_TOKENS)
            other = random_tokens(draw, OTHER_TOKENS) if state == "busy" else None
            for system in systems if nth % 2 else systems[::-1]:
                times[state, system.name].append(times_of(asyncio.run(ask(system, question, other))))
    for state in STATES:
        ours, theirs = times[state, OURS][1:], times[state, THEIRS][1:]
        for figure in ours[0]:
            own, baseline = ([1e3 * each[figure] for each in some] for some in (ours, theirs))
            report(f"stream/{state}/{figure}", own, "ms", baseline=baseline)


async def ask(system: System, question: list[int], other: list[int] | None) -> Answer:
    """The answer to the question. Returns when all requests are answered; SystemExit if one was not."""
    async with aiohttp.ClientSession() as http:
        client = Client(http, system.url)
        asked = asyncio.create_task(client.generate(question, ANSWER_TOKENS, "question"))
        answers = []
        if other is not None:
            await asyncio.sleep(HEAD_START_S)
            answers.append(await client.generate(other, 1, "other"))
        answers.append(await asked)
    for answer in answers:
        if answer.error is not None:
            raise SystemExit(f"{system.name}: {answer.error}")
    return answers[-1]


def times_of(answer: Answer) -> dict[str, float]:
    """Figures by name, in seconds."""
    assert answer.first_s is not None
    return {"first_token": answer.first_s - answer.begun_s, "answer": answer.ended_s - answer.begun_s}


if __name__ == "__main__":
    main()
