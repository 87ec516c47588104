"""Injects one fault after the other under load, and waits after each until every worker serves again.

    load ──────────────────────────────────────────────> stop, all requests end ──> nothing is left
          warm_s │ strike ── hold_s ── mend │ every worker has answered right
Knows no servers: a `World` has them.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import aiohttp

from .answers import Answer, Manner, Outcome, put
from .ledger import Row
from .requests import Ask

AFTER_ERROR_S = 0.05


class World(Protocol):
    """A router and the workers behind it."""

    name: str
    url: str

    def workers(self) -> frozenset[str]:
        """The ids of all workers that serve without faults."""

    async def leaks(self) -> list[str]:
        """Resources that are still held when nothing runs; waits a while for their release."""


async def nothing() -> None:
    """No fault."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault with a beginning and an end."""

    kind: str
    target: str
    strike: Callable[[], Awaitable[object]] = nothing
    mend: Callable[[], Awaitable[object]] = nothing
    hold_s: float = 0.3
    router_dies: bool = False
    """The fault breaks the connections of its clients."""
    odd: Manner | None = None
    """The behaviour of half of the clients during the fault."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The load and the time limits."""

    num_clients: int
    warm_s: float
    recover_s: float
    limit_s: float
    """Seconds after which a request without an end is lost."""
    cold_share: float = 0.0
    """The requests that no worker can have cached: they reach all workers."""


@dataclass(slots=True)
class Load:
    """Clients that send one request after another until `stop`."""

    url: str
    asks: Sequence[Ask]
    pace: Pace
    answers: list[Answer] = field(default_factory=list)
    odd: Manner | None = None
    _stopped: bool = False

    async def run(self, seed: int) -> None:
        """Send requests until `stop`; return when every request has ended."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout()) as session:
            clients = (
                self._client(session, random.Random(seed + i), i) for i in range(self.pace.num_clients)
            )
            await asyncio.gather(*clients)

    def stop(self) -> None:
        """Send no more requests."""
        self._stopped = True

    async def _client(self, session: aiohttp.ClientSession, draw: random.Random, number: int) -> None:
        while not self._stopped:
            usual = Manner(self.pace.limit_s)
            manner = self.odd if self.odd is not None and number % 2 else usual
            ask, stream = draw.choice(self.asks), draw.random() < 0.6
            if draw.random() < self.pace.cold_share:
                ask = replace(ask, body={**ask.body, "cache_salt": str(draw.random())})
            answer = await put(session, self.url, ask, stream=stream, manner=manner)
            self.answers.append(answer)
            if answer.outcome is not Outcome.RIGHT:
                await asyncio.sleep(AFTER_ERROR_S)


async def bout(world: World, asks: Sequence[Ask], pace: Pace, fault: Fault, seed: int) -> Row:
    """Let `fault` happen under load and account for every request."""
    row = Row(world.name, fault.kind, fault.target)
    load = Load(world.url, asks, pace)
    running = asyncio.create_task(load.run(seed * 1000))
    try:
        await asyncio.sleep(pace.warm_s)
        load.odd = fault.odd
        await fault.strike()
        await asyncio.sleep(fault.hold_s)
        await fault.mend()
        load.odd = None
        mended_s = time.monotonic()
        row.recovered_s, missing = await _recovery(load, world.workers(), mended_s, pace.recover_s)
        if missing:
            row.notes.append(f"have not answered right again: {sorted(missing)}")
            row.notes += [f"instead: {one.decision}" for one in load.answers[-2:]]
    finally:
        load.stop()
        await running
    row.count(load.answers, router_dies=fault.router_dies)
    leaks = await world.leaks()
    row.leaked = len(leaks)
    row.notes += [f"leaked: {leak}" for leak in leaks]
    return row


async def _recovery(
    load: Load, workers: frozenset[str], since_s: float, limit_s: float
) -> tuple[float | None, set[str]]:
    """Seconds until each worker had answered a later request right, and the workers that had not."""
    first: dict[str, float] = {}
    while True:
        for answer in load.answers:
            if answer.outcome is Outcome.RIGHT and answer.began_s >= since_s:
                for name in answer.instances:
                    first[name] = min(first.get(name, answer.ended_s), answer.ended_s)
        if workers <= first.keys():
            return max((first[name] for name in workers), default=since_s) - since_s, set()
        if time.monotonic() - since_s > limit_s:
            return None, set(workers - first.keys())
        await asyncio.sleep(0.02)
