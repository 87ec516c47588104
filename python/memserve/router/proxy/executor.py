"""Runs one attempt of a request on its instances: fetch, run the legs, report to the scheduler.

fetch ── legs ── prefilled ── ended
Knows no other attempts and no client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

import msgspec

from memserve.router.cluster.instance import Instance, Pair, Route
from memserve.router.proxy.fetcher import Fetcher
from memserve.router.proxy.merge import cached_tokens_in, rid_field
from memserve.router.proxy.n_sampling import SampleJoiner, as_batch, as_singles, join_answers
from memserve.router.proxy.pd_pair import OnPrefilled, PairRunner, parsed
from memserve.router.proxy.placement import GlobalScheduler, Placement
from memserve.router.proxy.relay import Write, relay
from memserve.router.proxy.upstream import Upstream
from memserve.router.request import Api, GenerationRequest, decode_json, encode_json
from memserve.router.sse import data_of

T = TypeVar("T")


class RequestExecutor:
    """Runs placed requests. Event loop thread only."""

    def __init__(self, upstream: Upstream, scheduler: GlobalScheduler, fetcher: Fetcher) -> None:
        self._upstream = upstream
        self._pairs = PairRunner(upstream)
        self._scheduler = scheduler
        self._fetcher = fetcher

    async def answer(self, request: GenerationRequest, placement: Placement) -> bytes:
        """The whole answer. Raises as `Upstream.leg`."""
        is_answered = False
        try:
            on_prefilled = await self._begin(request, placement)
            answer = await self._answer(request, placement, on_prefilled)
            is_answered = True
            return answer
        finally:
            self._scheduler.ended(placement, is_answered=is_answered)

    async def stream(self, request: GenerationRequest, placement: Placement, write: Write) -> None:
        """Write the answer as it comes. Raises as `Upstream.leg` and `write`."""
        is_answered = False
        try:
            on_prefilled = await self._begin(request, placement)
            await self._stream(request, placement.route, on_prefilled, write)
            is_answered = True
        finally:
            self._scheduler.ended(placement, is_answered=is_answered)

    async def _begin(self, request: GenerationRequest, placement: Placement) -> OnPrefilled:
        """Fetch cached blocks; the callback for prefill's answer."""
        waited_s = await self._fetcher.wait(placement.assignment.benefits_from)
        if waited_s is not None:
            self._scheduler.waited(waited_s)
        if (plan := placement.assignment.plan) is not None:
            self._scheduler.fetched(placement, await self._fetcher.run(plan, placement.links))
        self._scheduler.sent(placement)

        def on_prefilled(answer: Any) -> None:
            self._scheduler.prefilled(placement, _num_cached(request, answer))

        return on_prefilled

    async def _stream(
        self, request: GenerationRequest, route: Route, on_prefilled: OnPrefilled, write: Write
    ) -> None:
        if not isinstance(route, Pair):
            await self._relay(request, route.worker, on_prefilled, write)
        elif request.num_samples == 1:
            await self._pairs.stream(request, route, on_prefilled, write)
        elif request.api is Api.GENERATE:
            await self._pairs.stream(as_batch(request), route, on_prefilled, write)
        else:
            await self._stream_samples(request, route, on_prefilled, write)

    async def _answer(
        self, request: GenerationRequest, placement: Placement, on_prefilled: OnPrefilled
    ) -> bytes:
        route = placement.route
        if not isinstance(route, Pair):
            whole = await self._upstream.fetch(route.worker, request, _own_body(request))
            answer = parsed(route.worker, whole)
            # The first token of a longer answer came some time ago.
            is_timely = placement.prompt.output_tokens == 1
            self._scheduler.prefilled(placement, _num_cached(request, answer), is_timely=is_timely)
            return whole
        if request.num_samples == 1:
            return await self._pairs.answer(request, route, on_prefilled)
        if request.api is Api.GENERATE:
            return await self._pairs.answer(as_batch(request), route, on_prefilled)
        answers = await _all(
            self._pairs.answer(single, route, on_prefilled) for single in as_singles(request)
        )
        return join_answers(request, answers)

    async def _relay(
        self, request: GenerationRequest, worker: Instance, on_prefilled: OnPrefilled, write: Write
    ) -> None:
        def on_first(chunk: bytes) -> None:
            on_prefilled(_parsed(data_of(chunk)))

        async with self._upstream.leg(worker, request, _own_body(request)) as leg:
            await relay(leg, write, on_first)

    async def _stream_samples(
        self, request: GenerationRequest, pair: Pair, on_prefilled: OnPrefilled, write: Write
    ) -> None:
        joiner = SampleJoiner(request)

        async def run(sample: int, single: GenerationRequest) -> None:
            async def write_sample(chunk: bytes) -> None:
                if joined := joiner.feed(sample, chunk):
                    await write(joined)

            await self._pairs.stream(single, pair, on_prefilled, write_sample)

        await _all(run(sample, single) for sample, single in enumerate(as_singles(request)))
        await write(joiner.end())


def _own_body(request: GenerationRequest) -> bytes:
    """The body for a colocated server."""
    return encode_json({**request.body, "rid": rid_field(request)})


def _parsed(answer: bytes) -> Any:
    """`answer` as JSON values; None if it is not JSON, as an incomplete event."""
    try:
        return decode_json(answer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _num_cached(request: GenerationRequest, answer: Any) -> int | None:
    """The cached tokens of all prompts that a parsed answer, or its first event, reports."""
    try:
        cached = cached_tokens_in(request, answer)
    except (KeyError, TypeError, AttributeError):
        return None  # an event without them, or an incomplete one
    if isinstance(cached, list):
        counts = [one for one in cached if one is not None]
        return sum(counts) if len(counts) == len(cached) else None
    return cached


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results. The first failure cancels the rest and is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
