"""From a checked call to an answer: read, placed, its history fetched if that pays, and run there.

read ──> Prompt      answer, stream:  place ── fetch ── legs ── prefilled ── ended
                                        ^                │ an instance failed, and the client
                                        └──── a while ───┘ has seen nothing yet
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from memserve.core.errors import BadRequest
from memserve.router.cluster.instance import Instance, Pair, Snapshot
from memserve.router.observe.metrics import RouterMetrics
from memserve.router.placing.decision import Decision
from memserve.router.placing.fetching import Fetcher
from memserve.router.placing.placed import Placed
from memserve.router.serving.api import Api, Call, encode_json
from memserve.router.serving.failures import LegFailed, LegTimeout, NoRoute, WorkerFault
from memserve.router.serving.merge import prefill_cached_tokens, rid_field
from memserve.router.serving.pair import OnPrefilled, PairRunner, Write
from memserve.router.serving.retry import Alias, Patience, choices, wait_s
from memserve.router.serving.samples import SampleJoiner, as_batch, as_singles, join_answers
from memserve.router.serving.sse import data_of
from memserve.router.serving.upstream import Upstream
from memserve.router.state import RouterState
from memserve.router.text.prompts import Prompt, PromptReader

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnPlaced = Callable[[Placed, int], None]
"""Told where a call goes now, and which attempt that is, from 1."""

DEFAULT_MODEL = "default"
"""What SGLang calls the model that a request does not name."""


class Sink(Protocol):
    """The client's end of a stream."""

    @property
    def has_begun(self) -> bool:
        """Whether the client may have seen anything."""

    async def write(self, chunk: bytes) -> None:
        """Send `chunk` now. Raises ClientLeft."""


@dataclass(frozen=True, slots=True)
class Job:
    """A call that can be placed."""

    call: Call
    prompt: Prompt
    model: str | None
    """The one that is meant, also if the call names none; None if nobody was there to serve any."""


class Dispatcher:
    """Runs calls. Event loop thread only."""

    def __init__(
        self,
        state: RouterState,
        fetcher: Fetcher,
        upstream: Upstream,
        patience: Patience,
        metrics: RouterMetrics,
    ) -> None:
        self._cluster = state.cluster
        self._placer = state.placer
        self._breakers = state.breakers
        self._reader = PromptReader(state.tokenizers)
        self._fetcher = fetcher
        self._upstream = upstream
        self._pairs = PairRunner(upstream)
        self._patience = patience
        self._metrics = metrics

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

    async def read(self, call: Call, candidates: Snapshot, headers: Mapping[str, str]) -> Job:
        """The call as servers should get it, and what is known of its prompts."""
        facts = [one.facts for one in candidates.all()]
        model = facts[0].model if facts else None
        page_tokens = next((one.page_size for one in facts if one.page_size), None)
        call, prompt = await self._reader.read(call, model, page_tokens, headers)
        return Job(call, prompt, model)

    def explain(self, job: Job) -> Decision:
        """Where a call would go. Raises NoRoute if no pair is whole."""
        ready = self._ready(job)
        decision = self._placer.decide(self._breakers.admitted(ready), job.prompt)
        if decision is None:
            raise NoRoute(ready.why_unready() or "no server is ready")
        return decision

    async def answer(self, job: Job, on_placed: OnPlaced) -> bytes:
        """The whole answer. Raises NoRoute, LegTimeout, and what `Upstream.leg` raises."""
        return await self._tried(job, on_placed, self._answer, lambda: False)

    async def stream(self, job: Job, on_placed: OnPlaced, sink: Sink) -> None:
        """Write the events as they come. Raises as `answer`, maybe after a write."""

        async def run(call: Call, placed: Placed, alias: Alias | None) -> None:
            await self._stream(call, placed, alias.remover(sink.write) if alias else sink.write)

        await self._tried(job, on_placed, run, lambda: sink.has_begun)

    # ---- attempts

    async def _tried(
        self,
        job: Job,
        on_placed: OnPlaced,
        run: Callable[[Call, Placed, Alias | None], Coroutine[Any, Any, T]],
        has_begun: Callable[[], bool],
    ) -> T:
        """What `run` gives, again elsewhere while it is the instances that fail and nothing was seen."""
        placed, alias, faults = self._place(job), None, list[WorkerFault]()
        async with self._in_time() as ends_s:
            while True:
                on_placed(placed, len(faults) + 1)
                try:
                    result = await run(alias.of(job.call) if alias else job.call, placed, alias)
                except WorkerFault as fault:
                    faults.append(fault)
                    self._note(fault, placed, len(faults))
                    if has_begun():
                        raise
                    placed, alias = await self._place_again(job, faults, ends_s), Alias()
                else:
                    for instance in placed.instances:
                        self._breakers.answered(instance)
                    return result

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[float]:
        """A block that has to end by the loop time it is given. Raises LegTimeout."""
        timeout_s = self._patience.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                yield asyncio.get_running_loop().time() + timeout_s
        except TimeoutError as error:
            raise LegTimeout(f"no answer within {timeout_s:g} s") from error

    def _ready(self, job: Job) -> Snapshot:
        """Who could serve it now."""
        return Snapshot() if job.model is None else self._cluster.snapshot.serving(job.model)

    def _place(self, job: Job) -> Placed:
        """Who takes the call, which then has to be run. Raises NoRoute if no pair is whole."""
        ready = self._ready(job)
        placed = self._placer.place(self._breakers.admitted(ready), job.prompt)
        if placed is None:
            raise NoRoute(ready.why_unready() or "no server is ready")
        self._sent(placed)
        return placed

    async def _place_again(self, job: Job, faults: Sequence[WorkerFault], ends_s: float) -> Placed:
        """The same after a while, elsewhere if possible. Raises the last fault if nobody is ready then."""
        fault, failed = faults[-1], [one.instance_id for one in faults]
        num_tries = len(faults)
        while True:
            left_s = ends_s - asyncio.get_running_loop().time()
            seconds = wait_s(self._patience, num_tries, left_s)
            if seconds is None:
                raise fault
            await asyncio.sleep(seconds)
            num_tries += 1
            for snapshot in choices(self._ready(job), failed):
                placed = self._placer.place(self._breakers.admitted(snapshot), job.prompt)
                if placed is not None:
                    self._sent(placed)
                    self._metrics.retries.labels(fault.kind).inc()
                    logger.warning(
                        "request done again rid=%s attempt=%d instances=%s reason=%s",
                        *(job.call.rid, len(faults) + 1, placed.route, fault),
                    )
                    return placed

    def _sent(self, placed: Placed) -> None:
        for instance in placed.instances:
            self._breakers.sent(instance)

    def _note(self, fault: WorkerFault, placed: Placed, num_attempts: int) -> None:
        """Count it against who it was. A lost connection was counted when it was noticed, once for all."""
        fault.num_attempts = num_attempts
        if isinstance(fault, LegFailed):
            for instance in placed.instances:
                if instance.instance_id == fault.instance_id:
                    self._breakers.failed(instance)

    # ---- one attempt

    async def _answer(self, call: Call, placed: Placed, alias: Alias | None) -> bytes:
        async with self._running(call, placed) as on_prefilled:
            answer = await self._run(call, placed, on_prefilled)
        return alias.removed(answer) if alias else answer

    async def _run(self, call: Call, placed: Placed, on_prefilled: OnPrefilled) -> bytes:
        route = placed.route
        if not isinstance(route, Pair):
            whole = await self._upstream.fetch(route.worker, call, _own_body(call))
            self._placer.prefilled(placed, _num_cached(call, whole), is_timely=False)
            return whole
        if call.num_samples == 1:
            return await self._pairs.answer(call, route, on_prefilled)
        if call.api is Api.GENERATE:
            return await self._pairs.answer(as_batch(call), route, on_prefilled)
        answers = await _all(self._pairs.answer(single, route, on_prefilled) for single in as_singles(call))
        return join_answers(call, answers)

    async def _stream(self, call: Call, placed: Placed, write: Write) -> None:
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
            if chunk := await leg.first():
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
