"""From a checked call to an answer: asks the policy for a route and runs the call there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from memserve.core.errors import BadRequest
from memserve.router.api import Api, Call, encode_json
from memserve.router.cluster import Cluster
from memserve.router.failures import NoRoute
from memserve.router.instance import Instance, Pair, Route, Snapshot
from memserve.router.merge import rid_field
from memserve.router.pair import PairRunner, Write
from memserve.router.samples import SampleJoiner, as_batch, as_singles, join_answers
from memserve.router.upstream import Upstream

T = TypeVar("T")
Policy = Callable[[Snapshot, int], Route | None]

DEFAULT_MODEL = "default"
"""What SGLang calls the model that a request does not name."""


class Dispatcher:
    """Runs calls. Event loop thread only."""

    def __init__(self, cluster: Cluster, policy: Policy, upstream: Upstream) -> None:
        self._cluster = cluster
        self._policy = policy
        self._upstream = upstream
        self._pairs = PairRunner(upstream)
        self._turn = 0

    def candidates(self, model: str | None) -> Snapshot:
        """The ready instances that serve `model`.

        Without a name, those of the first model there is. Raises BadRequest (404) for a model
        that nobody here serves.
        """
        snapshot = self._cluster.snapshot
        models = snapshot.models()
        if not models:
            return snapshot
        if model in (None, DEFAULT_MODEL):
            return snapshot.serving(models[0])
        serving = snapshot.serving(model or "")
        if not serving.all():
            message = f"The model '{model}' does not exist; served here: {', '.join(models)}"
            raise BadRequest(message, field="model", status=404)
        return serving

    def route(self, candidates: Snapshot) -> Route:
        """Who takes the next call. Raises NoRoute if no pair is whole."""
        route = self._policy(candidates, self._turn)
        if route is None:
            raise NoRoute(candidates.why_unready() or "no server is ready")
        self._turn += 1
        return route

    async def answer(self, call: Call, route: Route) -> bytes:
        """The whole answer. Raises what `Upstream.leg` raises."""
        if not isinstance(route, Pair):
            return await self._upstream.fetch(route.worker, call, _own_body(call))
        if call.num_samples == 1:
            return await self._pairs.answer(call, route)
        if call.api is Api.GENERATE:
            return await self._pairs.answer(as_batch(call), route)
        answers = await _all(self._pairs.answer(single, route) for single in as_singles(call))
        return join_answers(call, answers)

    async def stream(self, call: Call, route: Route, write: Write) -> None:
        """Write the events as they come. Raises what `Upstream.leg` raises, maybe after a write."""
        if not isinstance(route, Pair):
            await self._relay(call, route.worker, write)
        elif call.num_samples == 1:
            await self._pairs.stream(call, route, write)
        elif call.api is Api.GENERATE:
            await self._pairs.stream(as_batch(call), route, write)
        else:
            await self._stream_samples(call, route, write)

    async def _relay(self, call: Call, worker: Instance, write: Write) -> None:
        async with self._upstream.leg(worker, call, _own_body(call)) as leg:
            while chunk := await leg.next():
                await write(chunk)

    async def _stream_samples(self, call: Call, pair: Pair, write: Write) -> None:
        joiner = SampleJoiner(call)

        async def run(sample: int, single: Call) -> None:
            async def write_sample(chunk: bytes) -> None:
                if joined := joiner.feed(sample, chunk):
                    await write(joined)

            await self._pairs.stream(single, pair, write_sample)

        await _all(run(sample, single) for sample, single in enumerate(as_singles(call)))
        await write(joiner.end())


def _own_body(call: Call) -> bytes:
    """The body for a server that does everything itself."""
    return encode_json({**call.body, "rid": rid_field(call)})


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Every result; the first failure cancels the rest and is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
