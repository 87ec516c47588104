"""Executes a plan against one server and records each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import aiohttp

from load.client import Answer, Client
from load.plan import Plan, Planned
from load.records import Outcome

TIMEOUT_S = 300.0


async def drive(url: str, plan: Plan, on_done: Callable[[Outcome], None] = lambda _: None) -> list[Outcome]:
    """The records of all requests, in the order of their ends. Calls `on_done` with each."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    at_once = asyncio.Semaphore(plan.at_once or len(plan.sessions) or 1)
    outcomes: list[Outcome] = []

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        on_done(outcome)

    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        client = Client(http, url)
        begun = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for planned in plan.sessions:
                group.create_task(_converse(client, planned, plan.num_warmup, begun, at_once, done))
    return outcomes


async def _converse(
    client: Client,
    planned: Planned,
    num_warmup: int,
    begun: float,
    at_once: asyncio.Semaphore,
    done: Callable[[Outcome], None],
) -> None:
    """Send one session, each turn not before its planned time and not before the previous answer."""
    history: list[int] = []
    async with at_once:
        turns = zip(planned.session.turns, planned.at_s, planned.ranks, strict=True)
        for number, (turn, at_s, rank) in enumerate(turns):
            await asyncio.sleep(max(0.0, begun + at_s - time.perf_counter()))
            prompt = [*history, *turn.new_tokens]
            answer = await client.generate(prompt, turn.num_output, planned.session.name)
            done(
                outcome_of(answer, planned.session.name, number, begun, len(prompt), warmup=rank < num_warmup)
            )
            if answer.error is not None:
                return  # what would follow is another conversation
            if planned.session.grows:
                history = [*prompt, *answer.output]


def outcome_of(
    answer: Answer, session: str, turn: int, begun: float, num_prompt: int, *, warmup: bool
) -> Outcome:
    """The record of one answer."""
    num_output = len(answer.output)
    ttft_s = answer.first_s - answer.begun_s if answer.first_s is not None else None
    jct_s = answer.ended_s - answer.begun_s
    tpot_s = None
    if ttft_s is not None and num_output > 1 and answer.error is None:
        tpot_s = (jct_s - ttft_s) / (num_output - 1)
    details = answer.report.get("prefill_cached_tokens_details") or {}
    return Outcome(
        session=session,
        turn=turn,
        sent_s=answer.begun_s - begun,
        ttft_s=ttft_s,
        jct_s=None if answer.error else jct_s,
        tpot_s=tpot_s,
        prompt_tokens=num_prompt,
        output_tokens=num_output,
        reused_hbm=details.get("device"),
        reused_dram=details.get("host"),
        reused=answer.report.get("prefill_cached_tokens"),
        error=answer.error,
        warmup=warmup,
    )
