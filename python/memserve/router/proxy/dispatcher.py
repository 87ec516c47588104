"""From a prepared request to its answer: each attempt is executed, and a broken stream is resumed.

RetryLoop ── attempt ──> RequestExecutor ──> the answer
                            └──> ResumableStream ──> the client's sink
"""

from __future__ import annotations

from collections.abc import Sequence

from memserve.router.errors import UpstreamFault
from memserve.router.proxy.aborts import RunningRequests, check_abort
from memserve.router.proxy.executor import RequestExecutor
from memserve.router.proxy.names import with_told_names
from memserve.router.proxy.placement import Placement
from memserve.router.proxy.prepare import PreparedRequest
from memserve.router.proxy.recovery import StreamRecovery
from memserve.router.proxy.relay import Sink
from memserve.router.proxy.retry import Attempt, OnPlaced, RequestObserver, RetryLoop
from memserve.router.proxy.stream_splicer import Diverged
from memserve.router.proxy.upstream import Upstream
from memserve.scheduling.decision import Decision


class Dispatcher:
    """Runs requests. Event loop thread only."""

    def __init__(
        self,
        retries: RetryLoop,
        executor: RequestExecutor,
        recovery: StreamRecovery,
        observer: RequestObserver,
        upstream: Upstream,
    ) -> None:
        """`upstream` sends the aborts that clients ask for."""
        self._retries = retries
        self._executor = executor
        self._recovery = recovery
        self._observer = observer
        self._upstream = upstream
        self._running = RunningRequests()

    def explain(self, prepared: PreparedRequest) -> Decision:
        """Where a request would go. Raises NoRoute."""
        return self._retries.decide(prepared)

    async def answer(self, prepared: PreparedRequest, on_placed: OnPlaced) -> bytes:
        """The whole answer. Raises as `RetryLoop.run` and `Upstream.leg`."""

        async def execute(attempt: Attempt, placement: Placement) -> bytes:
            answer = await self._executor.answer(attempt.request, placement)
            check_abort(attempt.request, placement.instances[-1], answer)
            return with_told_names(attempt.request.mark, answer)

        async def next_attempt(_: UpstreamFault) -> Attempt:
            return Attempt.again(prepared.request)

        with self._running.running(prepared.request):
            return await self._retries.run(prepared, on_placed, execute, next_attempt)

    async def stream(self, prepared: PreparedRequest, on_placed: OnPlaced, sink: Sink) -> None:
        """Write the events as they come. Raises as `answer`, and Diverged; possibly after a write."""
        request = prepared.request
        stream = self._recovery.open(request, sink, self._retries.ready(prepared))

        async def execute(attempt: Attempt, placement: Placement) -> None:
            resumption = attempt.resumption
            splicer = resumption.splicer if resumption else None
            write = stream.writer(attempt.request, placement.instances[-1], splicer)
            try:
                await self._executor.stream(attempt.request, placement, write)
            except UpstreamFault:
                closing = self._recovery.closing_events(request, stream)
                if closing is None:
                    raise
                await stream.write(closing)
            except Diverged:
                self._observer.count_resumed("diverged")
                raise
            await stream.end()
            if resumption is not None:
                self._observer.count_resumed("continued" if resumption.num_accepted else "repeated")

        async def next_attempt(fault: UpstreamFault) -> Attempt:
            if not sink.has_begun:
                return Attempt.again(request)
            ready = self._retries.ready(prepared)
            resumption = await self._recovery.resume(request, prepared.model, stream, ready)
            if isinstance(resumption, str):
                self._observer.count_resumed("refused")
                fault.not_resumed_reason = resumption
                raise fault
            return Attempt.again(resumption.request, resumption)

        with self._running.running(request):
            await self._retries.run(prepared, on_placed, execute, next_attempt)

    def abort(self, tenant: str | None, names: Sequence[str] | None) -> None:
        """Abort the tenant's running requests of these names; all of them for None.

        `tenant` None: the requests of all tenants. Unknown names are ignored, as by SGLang.
        """
        for request, part in self._running.abort(tenant, names):
            self._upstream.abort(request, part)
