"""A router in front of fake workers, all on the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from memserve.core.ids import Epoch, InstanceId
from memserve.router.app import Router, running_router
from memserve.router.config import RouterConfig
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import InstanceInfo, Role

DEADLINE_S = 10.0


@dataclass
class Stage:
    """One router with its workers, and a client."""

    router: Router
    client: aiohttp.ClientSession
    workers: dict[Role, list[FakeWorker]] = field(default_factory=dict)

    @property
    def prefill(self) -> FakeWorker:
        return self.workers[Role.PREFILL][0]

    @property
    def decode(self) -> FakeWorker:
        return self.workers[Role.DECODE][0]

    @property
    def colocated(self) -> FakeWorker:
        return self.workers[Role.COLOCATED][0]

    def url(self, path: str) -> str:
        return self.router.url + path

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, Any]:
        """Status and parsed answer."""
        async with self.client.post(self.url(path), json=body, **kwargs) as response:
            return response.status, await response.json()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.client.get(self.url(path)) as response:
            return response.status, await response.json()

    async def events(self, path: str, body: Any, **kwargs: Any) -> list[bytes]:
        """The events of a stream, without their blank lines."""
        async with self.client.post(self.url(path), json=body, **kwargs) as response:
            assert response.status == 200, await response.text()
            return [event for event in (await response.read()).split(b"\n\n") if event]

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for something that no event tells of."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    def is_ready(self) -> bool:
        return self.router.cluster.snapshot.unavailable_reason() is None


def info_of(worker: FakeWorker, epoch: int = 1, name: str | None = None) -> InstanceInfo:
    """How a fake worker would register."""
    port = worker.bootstrap_port if worker.role is Role.PREFILL else None
    return InstanceInfo(
        InstanceId(name or f"{worker.role}-{worker.port}"), Epoch(epoch), worker.role, worker.url, port
    )


@asynccontextmanager
async def staged(*workers: FakeWorker, **settings: Any) -> AsyncIterator[Stage]:
    """A router whose registered instances are `workers`, ready."""
    config = RouterConfig.of(**{"port": 0, "shutdown_grace_period_secs": 0.05, **settings})
    by_role: dict[Role, list[FakeWorker]] = {}
    for worker in workers:
        by_role.setdefault(worker.role, []).append(worker)
        await worker.start()
    try:
        async with running_router(config) as router, aiohttp.ClientSession() as client:
            stage = Stage(router, client, by_role)
            for worker in workers:
                router.cluster.register(info_of(worker))
            await stage.until(lambda: len(router.cluster.snapshot.all()) == len(workers))
            yield stage
    finally:
        for worker in workers:
            await worker.kill()


def pair() -> tuple[FakeWorker, FakeWorker]:
    return FakeWorker(Role.PREFILL), FakeWorker(Role.DECODE)
