"""Requests that run while a test changes the workers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from memserve.router.cluster.breaker import BreakerState
from memserve.testing.fake_worker import FakeWorker

from ..harness import Stage, info_of


class Ask:
    """A request that runs while the test changes the workers."""

    def __init__(self, stage: Stage, path: str = "/generate", body: dict[str, Any] | None = None) -> None:
        self._stage = stage
        self._path = path
        self._body = body or {"text": "hello"}
        self.headers: Any = {}
        self.begun = asyncio.Event()
        """Set when the client has the status."""
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> tuple[int, str]:
        async with self._stage.client.post(self._stage.url(self._path), json=self._body) as response:
            self.headers = response.headers
            self.begun.set()
            return response.status, await response.text()


def texts(answer: str, stream: bool) -> list[str]:
    """The text of each choice of an answer."""
    parts: dict[int, str] = {}
    if stream:
        assert answer.endswith("data: [DONE]\n\n")
        items = [json.loads(event[6:]) for event in answer.split("\n\n") if event.startswith("data: {")]
    else:
        whole = json.loads(answer)
        items = [{**one, "index": i} for i, one in enumerate(whole)] if isinstance(whole, list) else [whole]
    for item in items:
        if "text" in item:
            parts[item.get("index", 0)] = item["text"]
        for choice in item.get("choices", ()):
            said = choice.get("text") or (choice.get("delta") or choice.get("message"))["content"]
            parts[choice["index"]] = parts.get(choice["index"], "") + said
    return list(parts.values())


async def metric(stage: Stage, line: str) -> bool:
    async with stage.client.get(stage.url("/metrics")) as response:
        return line in await response.text()


def state(stage: Stage, worker: FakeWorker) -> BreakerState:
    info = info_of(worker)
    return stage.router.state.breakers.state(info.instance_id, info.epoch)
