"""From a checked call to an answer: read, placed, its history fetched if that pays, and run there.

read ──> Prompt      place ──> Placed      answer, stream:  fetch ── legs ── prefilled ── ended
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec

from memserve.core.errors import BadRequest
from memserve.router.api import Api, Call, encode_json
from memserve.router.cluster import Cluster
from memserve.router.decision import Decision
from memserve.router.failures import NoRoute
from memserve.router.fetching import Fetcher
from memserve.router.instance import Instance, Pair, Snapshot
from memserve.router.merge import prefill_cached_tokens, rid_field
from memserve.router.pair import OnPrefilled, PairRunner, Write
from memserve.router.placed import Placed
from memserve.router.placement import Placer
from memserve.router.prompts import Prompt, PromptReader
from memserve.router.samples import SampleJoiner, as_batch, as_singles, join_answers
from memserve.router.sse import data_of
from memserve.router.upstream import Upstream

T = TypeVar("T")

DEFAULT_MODEL = "default"
"""What SGLang calls the model that a request does not name."""


class Dispatcher:
    """Runs calls. Event loop thread only."""

    def __init__(
        self, cluster: Cluster, reader: PromptReader, placer: Placer, fetcher: Fetcher, upstream: Upstream
    ) -> None:
        self._cluster = cluster
        self._reader = reader
        self._placer = placer
        self._fetcher = fetcher
        self._upstream = upstream
        self._pairs = PairRunner(upstream)

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

    async def read(self, call: Call, candidates: Snapshot, headers: Mapping[str, str]) -> tuple[Call, Prompt]:
        """The call as servers should get it, and what is known of its prompts."""
        facts = [one.facts for one in candidates.all()]
        model = facts[0].model if facts else None
        page_tokens = next((one.page_size for one in facts if one.page_size), None)
        return await self._reader.read(call, model, page_tokens, headers)

    def place(self, candidates: Snapshot, prompt: Prompt) -> Placed:
        """Who takes the call, which then has to be run. Raises NoRoute if no pair is whole."""
        placed = self._placer.place(candidates, prompt)
        if placed is None:
            raise NoRoute(candidates.why_unready() or "no server is ready")
        return placed

    def explain(self, candidates: Snapshot, prompt: Prompt) -> Decision:
        """Who would take it. Raises as `place`."""
        decision = self._placer.decide(candidates, prompt)
        if decision is None:
            raise NoRoute(candidates.why_unready() or "no server is ready")
        return decision

    async def answer(self, call: Call, placed: Placed) -> bytes:
        """The whole answer. Raises what `Upstream.leg` raises."""
        route = placed.route
        async with self._running(call, placed) as on_prefilled:
            if not isinstance(route, Pair):
                whole = await self._upstream.fetch(route.worker, call, _own_body(call))
                self._placer.prefilled(placed, _num_cached(call, whole), is_timely=False)
                return whole
            if call.num_samples == 1:
                return await self._pairs.answer(call, route, on_prefilled)
            if call.api is Api.GENERATE:
                return await self._pairs.answer(as_batch(call), route, on_prefilled)
            answers = await _all(
                self._pairs.answer(single, route, on_prefilled) for single in as_singles(call)
            )
            return join_answers(call, answers)

    async def stream(self, call: Call, placed: Placed, write: Write) -> None:
        """Write the events as they come. Raises what `Upstream.leg` raises, maybe after a write."""
        route = placed.route
        async with self._running(call, placed) as on_prefilled:
            if not isinstance(route, Pair):
                await self._relay(call, route.worker, on_prefilled, write)
            elif call.num_samples == 1:
                await self._pairs.stream(call, route, on_prefilled, write)
            elif call.api is Api.GENERATE:
                await self._pairs.stream(as_batch(call), route, on_prefilled, write)
            else:
                await self._stream_samples(call, route, on_prefilled, write)

    @asynccontextmanager
    async def _running(self, call: Call, placed: Placed) -> AsyncIterator[OnPrefilled]:
        """A call on its way, its history fetched before; settled however the block is left."""

        def on_prefilled(answer: bytes) -> None:
            self._placer.prefilled(placed, _num_cached(call, answer))

        is_answered = False
        try:
            if placed.plan is not None:
                self._placer.fetched(placed, await self._fetcher.run(placed.plan))
            yield on_prefilled
            is_answered = True
        finally:
            self._placer.ended(placed, is_answered=is_answered)

    async def _relay(self, call: Call, worker: Instance, on_prefilled: OnPrefilled, write: Write) -> None:
        async with self._upstream.leg(worker, call, _own_body(call)) as leg:
            if chunk := await leg.next():
                on_prefilled(data_of(chunk))
            while chunk:
                await write(chunk)
                chunk = await leg.next()

    async def _stream_samples(self, call: Call, pair: Pair, on_prefilled: OnPrefilled, write: Write) -> None:
        joiner = SampleJoiner(call)

        async def run(sample: int, single: Call) -> None:
            async def write_sample(chunk: bytes) -> None:
                if joined := joiner.feed(sample, chunk):
                    await write(joined)

            await self._pairs.stream(single, pair, on_prefilled, write_sample)

        await _all(run(sample, single) for sample, single in enumerate(as_singles(call)))
        await write(joiner.end())


def _own_body(call: Call) -> bytes:
    """The body for a server that does everything itself."""
    return encode_json({**call.body, "rid": rid_field(call)})


def _num_cached(call: Call, answer: bytes) -> int | None:
    """Prompt tokens that were cached, all prompts together, by an answer or the first event of one."""
    try:
        cached = prefill_cached_tokens(call, answer)
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return None  # an event that says nothing of it, or has come in part
    if isinstance(cached, list):
        counts = [one for one in cached if one is not None]
        return sum(counts) if len(counts) == len(cached) else None
    return cached


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Every result; the first failure cancels the rest and is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
