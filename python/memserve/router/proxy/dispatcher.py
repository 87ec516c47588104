"""From a prepared request to an answer: placed, and tried until an instance has given all of it.

answer, stream:  place ── attempt ──> the answer
                   ^         │ an instance failed: the same again, or what
                   └─ a while┘ goes on with what the client has seen
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from memserve.core.ids import InstanceId
from memserve.router.cluster.instance import ClusterSnapshot
from memserve.router.cluster.member import ProcessStatus
from memserve.router.cluster.registry import SUSPECT_MISSES
from memserve.router.errors import (
    NoRoute,
    PoisonRequest,
    RequestTimeout,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamFault,
)
from memserve.router.observability.metrics import RouterMetrics
from memserve.router.proxy.executor import RequestExecutor
from memserve.router.proxy.prepare import PreparedRequest
from memserve.router.proxy.recovery import StreamRecovery
from memserve.router.proxy.recovery_policy import Resumption
from memserve.router.proxy.relay import Sink
from memserve.router.proxy.retry import AttemptId, RetryPolicy, backoff_s, find_poison, retry_candidates
from memserve.router.proxy.stream_splicer import Diverged
from memserve.router.request import GenerationRequest
from memserve.router.state import RouterState
from memserve.scheduling.assignment import Assignment
from memserve.scheduling.decision import Decision

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnPlaced = Callable[[Assignment, int], None]
"""Told where a call goes now, and which attempt that is, from 1."""

LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What is asked this time, and under which name."""

    call: GenerationRequest
    alias: AttemptId | None = None
    resumption: Resumption | None = None
    """How its events follow those that the client has."""

    def job(self, job: PreparedRequest) -> PreparedRequest:
        """What is to be placed for it."""
        if self.resumption is None or not self.resumption.num_accepted:
            return job
        return job.resumed(self.resumption.num_tokens)

    @classmethod
    def first(cls, call: GenerationRequest) -> _Attempt:
        """Under its own name, unless others could have the same: servers abort by prefix."""
        return cls.anew(call) if call.is_apart and call.rid_is_clients else cls(call)

    @classmethod
    def anew(cls, call: GenerationRequest, resumption: Resumption | None = None) -> _Attempt:
        """One more, under a name of its own."""
        alias = AttemptId()
        return cls(alias.of(call), alias, resumption)


class Dispatcher:
    """Runs calls. Event loop thread only."""

    def __init__(
        self,
        state: RouterState,
        runner: RequestExecutor,
        recovery: StreamRecovery,
        patience: RetryPolicy,
        metrics: RouterMetrics,
    ) -> None:
        self._cluster = state.cluster
        self._placer = state.selector
        self._breakers = state.breakers
        self._runner = runner
        self._recovery = recovery
        self._patience = patience
        self._metrics = metrics
        self._prefixes = state.telemetry.prefixes

    def explain(self, job: PreparedRequest) -> Decision:
        """Where a call would go. Raises as placing it would."""
        ready = self._ready(job)
        decision = self._placer.decide(self._breakers.admitted(ready), job.prompt)
        if decision is None:
            raise NoRoute(ready.unavailable_reason() or "no server is ready")
        return decision

    async def answer(self, job: PreparedRequest, on_placed: OnPlaced) -> bytes:
        """The whole answer. Raises NoRoute, PoisonRequest, RequestTimeout, and what `Upstream.leg` raises."""

        async def run(attempt: _Attempt, placed: Assignment) -> bytes:
            answer = await self._runner.answer(attempt.call, placed)
            return attempt.alias.removed(answer) if attempt.alias else answer

        async def again(_: UpstreamFault) -> _Attempt:
            return _Attempt.anew(job.call)

        return await self._tried(job, on_placed, run, again)

    async def stream(self, job: PreparedRequest, on_placed: OnPlaced, sink: Sink) -> None:
        """Write the events as they come. Raises as `answer`, and Diverged; maybe after a write."""
        stream = self._recovery.open(job.call, sink, self._ready(job))

        async def run(attempt: _Attempt, placed: Assignment) -> None:
            resumption = attempt.resumption
            write = stream.writer(attempt.alias, resumption.splicer if resumption else None)
            try:
                await self._runner.stream(attempt.call, placed, write)
            except UpstreamFault:
                closing = self._recovery.closing_events(job.call, stream)
                if closing is None:
                    raise
                await stream.write(closing)
            except Diverged:
                self._metrics.resumed.labels("diverged").inc()
                raise
            await stream.end()
            if resumption is not None:
                self._metrics.resumed.labels("continued" if resumption.num_accepted else "repeated").inc()

        async def go_on(fault: UpstreamFault) -> _Attempt:
            if not sink.has_begun:
                return _Attempt.anew(job.call)
            resumption = await self._recovery.resume(job.call, job.model, stream, self._ready(job))
            if isinstance(resumption, str):
                self._metrics.resumed.labels("refused").inc()
                fault.why_not_resumed = resumption
                raise fault
            return _Attempt.anew(resumption.call, resumption)

        await self._tried(job, on_placed, run, go_on)

    # ---- attempts

    async def _tried(
        self,
        job: PreparedRequest,
        on_placed: OnPlaced,
        run: Callable[[_Attempt, Assignment], Awaitable[T]],
        then: Callable[[UpstreamFault], Awaitable[_Attempt]],
    ) -> T:
        """What `run` gives, again elsewhere while it is the instances that fail.

        `then` says what is tried next, or raises what the client is told. Raises RequestTimeout.
        """
        placed, attempt = self._place(job), _Attempt.first(job.call)
        faults: list[UpstreamFault] = []
        timeout_s = self._patience.timeout_s
        if job.call.timeout_s is not None:
            timeout_s = min(timeout_s, job.call.timeout_s)
        ends_s = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(ends_s):
                while True:
                    on_placed(placed, len(faults) + 1)
                    try:
                        result = await run(attempt, placed)
                    except UpstreamFault as fault:
                        faults.append(fault)
                        self._note(fault, placed, len(faults))
                        attempt = await self._next(faults, then)
                        placed = await self._place_again(attempt.job(job), faults, ends_s)
                    else:
                        for instance in placed.instances:
                            self._breakers.answered(instance)
                        return result
        except TimeoutError as error:
            raise RequestTimeout(f"no answer within {timeout_s:g} s") from error

    async def _next(
        self, faults: list[UpstreamFault], then: Callable[[UpstreamFault], Awaitable[_Attempt]]
    ) -> _Attempt:
        """What `then` says is tried after the last of `faults`; those that it meets are added."""
        while True:
            fault = faults[-1]
            if (harm := await self._harmed(faults)) is not None:
                self._metrics.harmful.inc()
                raise harm from fault
            try:
                return await then(fault)
            except UpstreamFault as another:
                if another is fault:
                    raise
                faults.append(another)

    async def _harmed(self, faults: Sequence[UpstreamFault]) -> PoisonRequest | None:
        """As `harmed`, of instances that have ended: those that are silent are waited for."""
        clock = asyncio.get_running_loop().time
        until_s = clock() + SUSPECT_MISSES * self._cluster.heartbeat_s
        lost = [fault for fault in faults if isinstance(fault, UpstreamDisconnected)]
        while True:
            fates = [self._cluster.process_status(one.instance_id, one.epoch) for one in lost]
            ended, silent = (
                [one for one, fate in zip(lost, fates, strict=True) if fate is which]
                for which in (ProcessStatus.EXITED, ProcessStatus.UNKNOWN)
            )
            harm = find_poison([*ended, *silent])
            if harm is None or find_poison(ended) is not None or clock() >= until_s:
                return harm
            await asyncio.sleep(LOOK_S)

    def _ready(self, job: PreparedRequest) -> ClusterSnapshot:
        """Who could serve it now."""
        return job.eligible(self._cluster.snapshot)

    def _place(self, job: PreparedRequest) -> Assignment:
        """Who takes the call, which then has to be run.

        Raises NoRoute if no pair is whole.
        """
        ready = self._ready(job)
        placed = self._placer.place(self._breakers.admitted(ready), job.prompt)
        if placed is None:
            raise NoRoute(ready.unavailable_reason() or "no server is ready")
        self._sent(placed)
        self._prefixes.note(job.prompt, job.sample)
        return placed

    async def _place_again(
        self, job: PreparedRequest, faults: Sequence[UpstreamFault], ends_s: float
    ) -> Assignment:
        """The same after a while, elsewhere if possible. Raises the last fault if nobody is ready then."""
        fault, failed = faults[-1], [one.instance_id for one in faults]
        num_tries = len(faults)
        while True:
            left_s = ends_s - asyncio.get_running_loop().time()
            seconds = backoff_s(self._patience, num_tries, left_s)
            if seconds is None:
                raise fault
            await asyncio.sleep(seconds)
            num_tries += 1
            placed = self._place_elsewhere(job, failed)
            if placed is not None:
                self._metrics.retries.labels(fault.kind).inc()
                logger.warning(
                    "request done again rid=%s attempt=%d instances=%s reason=%s",
                    *(job.call.rid, len(faults) + 1, placed.route, fault),
                )
                return placed

    def _place_elsewhere(self, job: PreparedRequest, failed: Sequence[InstanceId]) -> Assignment | None:
        """Who takes the call, rather not one of those that `failed`; None if nobody is ready."""
        for snapshot in retry_candidates(self._ready(job), failed):
            placed = self._placer.place(self._breakers.admitted(snapshot), job.prompt)
            if placed is not None:
                self._sent(placed)
                return placed
        return None

    def _sent(self, placed: Assignment) -> None:
        for instance in placed.instances:
            self._breakers.sent(instance)

    def _note(self, fault: UpstreamFault, placed: Assignment, num_attempts: int) -> None:
        """Count it against who it was. A lost connection was counted when it was noticed, once for all."""
        fault.num_attempts = num_attempts
        if isinstance(fault, UpstreamError):
            for instance in placed.instances:
                if instance.instance_id == fault.instance_id:
                    self._breakers.failed(instance)
