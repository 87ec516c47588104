"""The legs of a pair end together: within 50 ms after a leg fails or the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import Stage, pair, staged

WITHIN_S = 0.05
ATTEMPTS = 5
"""Tries on a busy machine: the router is fast if one try is fast."""

ROLES = [Role.PREFILL, Role.DECODE]


async def under_way(stage: Stage, *, stream: bool, num_tokens: int = 0) -> asyncio.Task[Any]:
    """A request that both legs have; decode has sent `num_tokens` tokens."""
    for worker in (stage.prefill, stage.decode):
        worker.requests.clear()
        worker.aborts.clear()
    stage.prefill.script = Script(gates={0: asyncio.Event()})
    stage.decode.script = Script(gates={num_tokens: asyncio.Event()})
    asked = asyncio.create_task(stage.post("/generate", {"text": "hello", "stream": stream}))
    await stage.prefill.until(lambda w: w.requests)
    await stage.decode.until(lambda w: w.requests and w.requests[0].num_sent == num_tokens)
    return asked


async def ends_s(happens: Callable[[], Awaitable[Any]], *workers: FakeWorker) -> float:
    """Seconds from `happens` until all `workers` have lost the connection and got the abort."""
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    await happens()
    for worker in workers:
        await worker.until(lambda w: w.requests[0].dropped and w.aborts)
        assert worker.aborts[0] == worker.requests[0].rids[0]
    return loop.time() - begun_s


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failing", ROLES)
async def test_lost_leg_aborts_the_other_leg(failing: Role, stream: bool, num_tokens: int) -> None:
    took_s = []
    for _ in range(ATTEMPTS):
        async with staged(*pair(), retry_max_retries=0) as stage:
            asked = await under_way(stage, stream=stream, num_tokens=num_tokens)
            bad, good = stage.workers[failing][0], stage.workers[_other(failing)][0]
            took_s.append(await ends_s(bad.kill, good))
            await asyncio.gather(asked, return_exceptions=True)
        if took_s[-1] <= WITHIN_S:
            return
    pytest.fail(f"the other leg ended after {min(took_s) * 1000:.0f} ms at best")


class _Refusing(FakeWorker):
    """Answers with an error on command."""

    status = 500
    refuses: asyncio.Event

    async def _answer(self, request: Any, received: Any) -> Any:
        await self.refuses.wait()
        return web.json_response({"error": {"message": "no"}}, status=self.status)


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize("failing", ROLES)
async def test_refusing_leg_aborts_the_other_leg(failing: Role, status: int) -> None:
    took_s = []
    bad, good = _Refusing(failing), FakeWorker(_other(failing))
    bad.status = status
    async with staged(bad, good, retry_max_retries=0) as stage:
        for _ in range(ATTEMPTS):
            bad.refuses = asyncio.Event()
            asked = await under_way(stage, stream=False)

            async def refuses() -> None:
                bad.refuses.set()

            took_s.append(await ends_s(refuses, good))
            assert (await asked)[0] >= 400
            if took_s[-1] <= WITHIN_S:
                return
    pytest.fail(f"the other leg ended after {min(took_s) * 1000:.0f} ms at best")


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_client_frees_both_legs(stream: bool, num_tokens: int) -> None:
    took_s = []
    async with staged(*pair()) as stage:
        for _ in range(ATTEMPTS):
            asked = await under_way(stage, stream=stream, num_tokens=num_tokens)

            async def leaves(asked: asyncio.Task[Any] = asked) -> None:
                asked.cancel()

            took_s.append(await ends_s(leaves, stage.prefill, stage.decode))
            if took_s[-1] <= WITHIN_S:
                return
    pytest.fail(f"the legs ended after {min(took_s) * 1000:.0f} ms at best")


def _other(role: Role) -> Role:
    return Role.DECODE if role is Role.PREFILL else Role.PREFILL
