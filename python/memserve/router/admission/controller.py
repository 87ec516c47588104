"""Lets requests in: as a block that is entered when it is their turn, within a bounded time.

    async with gate.admitted(tenant, priority) as admitted:
        ...
        admitted.charge(tokens)

Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from memserve.router.admission.fair_queue import FairQueue, Refusal, TenantQueue, Waiter
from memserve.router.auth.keys import Tenant
from memserve.router.errors import Overloaded
from memserve.router.observability.metrics import RouterMetrics

_MESSAGES = {
    "requests": "too many requests per second",
    "tokens": "too many tokens per second",
    "queue_full": "too many requests are running, and too many wait",
    "queue_timeout": "too many requests are running: none has made room in time",
    "memory": "too many large requests at once",
    "connections": "too many connections",
}
_UNAVAILABLE = ("queue_timeout", "memory", "connections")
"""What is nobody's fault who asks: 503, all else 429."""


class AdmissionController:
    """Event loop thread only."""

    def __init__(self, admission: FairQueue, *, queue_timeout_s: float, metrics: RouterMetrics) -> None:
        """`queue_timeout_s` is how long a request waits for its turn at most."""
        self._admission = admission
        self._queue_timeout_s = queue_timeout_s
        self._metrics = metrics
        metrics.show("admitted_requests", "Requests that run.", lambda: admission.num_running)
        metrics.show("queued_requests", "Requests that wait for their turn.", self.num_waiting)

    def admitted(self, tenant: Tenant, priority: Callable[[], int] = lambda: 0) -> AdmissionSlot:
        """A block in which a request of `tenant` runs; higher priorities of it come first.

        `priority` is asked for only if it has to wait.
        Entering raises Overloaded. While there is room it costs neither a task nor a future.
        """
        return AdmissionSlot(
            self, self._admission, self._admission.share(tenant.name, tenant.rates), priority
        )

    def num_waiting(self) -> int:
        """How many requests wait for their turn."""
        return self._admission.num_waiting

    async def wait(self, share: TenantQueue, priority: int) -> float:
        """When it began. Raises Refusal, with a reason of its own if it took too long."""
        admission, loop = self._admission, asyncio.get_running_loop()
        future, came_s = loop.create_future(), loop.time()
        waiter = admission.wait(share, priority, lambda: None if future.done() else future.set_result(None))
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                await future
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise
        finally:
            self._metrics.queue_seconds.observe(loop.time() - came_s)
        if waiter.began_s is not None:
            return waiter.began_s
        if waiter.refusal is None:
            admission.abandon(waiter)
            raise Refusal("queue_timeout", admission.retry_after_s())
        raise waiter.refusal

    def refused(self, reason: str, after_s: float | None = None) -> Overloaded:
        """What a request is told that is not let in, counted. `after_s`: when it may be, if that is known."""
        self._metrics.refused.labels(reason).inc()
        status = 503 if reason in _UNAVAILABLE else 429
        return Overloaded(
            _MESSAGES[reason], status, self._admission.retry_after_s() if after_s is None else after_s
        )

    def _withdraw(self, waiter: Waiter) -> None:
        """Its client has left, maybe at the moment when it was its turn."""
        if waiter.began_s is not None:
            self._admission.leave(waiter.share, waiter.began_s)
        elif waiter.refusal is None:
            self._admission.abandon(waiter)


class AdmissionSlot:
    """One request's place among those that run. Made by `AdmissionController.admitted`."""

    __slots__ = ("_admission", "_began_s", "_gate", "_priority", "_share")

    def __init__(
        self, gate: AdmissionController, admission: FairQueue, share: TenantQueue, priority: Callable[[], int]
    ) -> None:
        self._gate, self._admission, self._share, self._priority = gate, admission, share, priority

    async def __aenter__(self) -> AdmissionSlot:
        try:
            began_s = self._admission.enter(self._share)
            if began_s is None:
                began_s = await self._gate.wait(self._share, self._priority())
        except Refusal as refusal:
            raise self._gate.refused(refusal.reason, refusal.after_s) from None
        self._began_s = began_s
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.leave(self._share, self._began_s)

    @property
    def is_charged(self) -> bool:
        """Whether tokens are counted at all."""
        return self._share.is_rated

    def charge(self, tokens: int) -> None:
        """Count tokens against its tenant's rate: once they are known, whether there is room or not."""
        self._admission.charge(self._share, tokens)
