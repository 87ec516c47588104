"""Admits requests: each runs inside an `AdmissionSlot`, which it gets in bounded time; bounds their memory.

    async with controller.admitted(tenant, priority) as slot:
        ...
        slot.charge(tokens)

Knows no HTTP and no metrics library.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from memserve.core.memory import total_memory_bytes
from memserve.router.admission.fair_queue import FairQueue, Refusal, TenantQueue, Waiter
from memserve.router.errors import Overloaded
from memserve.router.tenant import Tenant

SERVED_FACTOR = 9
"""Memory that a request takes while it is served, beside its body, per byte of body.

Measured with lists of token ids, which take the most (9.2 in all, 3.7 with text): the parsed body, its
blocks, and the bodies for both legs.
"""
_MESSAGES = {
    "requests": "too many requests per second",
    "tokens": "too many tokens per second",
    "queue_full": "too many requests are running, and too many wait",
    "queue_timeout": "too many requests are running: none has made room in time",
    "memory": "too many large requests at once",
    "connections": "too many connections",
}
_UNAVAILABLE = ("queue_timeout", "memory", "connections")
"""Refusal reasons answered 503 (router-side shortage); all others are 429."""


class AdmissionMetrics(Protocol):
    """Receives the counts of a controller."""

    def count_refusal(self, reason: str) -> None:
        """A request was refused."""

    def count_queued(self, seconds: float) -> None:
        """A request waited so long for a slot, or gave up."""

    def show(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Export `value` as a gauge."""


class AdmissionController:
    """Event loop thread only."""

    def __init__(self, queue: FairQueue, *, queue_timeout_s: float, metrics: AdmissionMetrics) -> None:
        """A request waits at most `queue_timeout_s` for a slot."""
        self.queue = queue
        self._queue_timeout_s = queue_timeout_s
        self._metrics = metrics
        metrics.show("admitted_requests", "Requests that run.", lambda: queue.num_running)
        metrics.show("queued_requests", "Requests that wait for their turn.", lambda: queue.num_waiting)

    def admitted(self, tenant: Tenant, priority: Callable[[], int] = lambda: 0) -> AdmissionSlot:
        """A block in which a request of `tenant` runs; higher priorities of one tenant go first.

        `priority` is called only if the request has to wait.
        Entering raises Overloaded. While slots are free it creates neither a task nor a future.
        """
        return AdmissionSlot(self, self.queue.tenant(tenant.name, tenant.rates), priority)

    async def wait(self, tenant: TenantQueue, priority: int) -> float:
        """The begin time of a request that had to wait. Raises Refusal, also after the queue timeout."""
        queue, loop = self.queue, asyncio.get_running_loop()
        future, came_s = loop.create_future(), loop.time()
        waiter = queue.wait(tenant, priority, lambda: None if future.done() else future.set_result(None))
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                await future
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise
        finally:
            self._metrics.count_queued(loop.time() - came_s)
        if waiter.began_s is not None:
            return waiter.began_s
        if waiter.refusal is None:
            queue.abandon(waiter)
            raise Refusal("queue_timeout", queue.retry_after_s())
        raise waiter.refusal

    def refused(self, reason: str, after_s: float | None = None) -> Overloaded:
        """The error for a refused request, which is counted. `after_s`: when to retry, if known."""
        self._metrics.count_refusal(reason)
        status = 503 if reason in _UNAVAILABLE else 429
        return Overloaded(
            _MESSAGES[reason], status, self.queue.retry_after_s() if after_s is None else after_s
        )

    def _withdraw(self, waiter: Waiter) -> None:
        """Its client has left, maybe in the same event loop turn in which it got a slot."""
        if waiter.began_s is not None:
            self.queue.leave(waiter.tenant, waiter.began_s)
        elif waiter.refusal is None:
            self.queue.abandon(waiter)


class AdmissionSlot:
    """The slot of one request. Made by `AdmissionController.admitted`."""

    __slots__ = ("_began_s", "_controller", "_priority", "_tenant")

    def __init__(
        self, controller: AdmissionController, tenant: TenantQueue, priority: Callable[[], int]
    ) -> None:
        self._controller, self._tenant, self._priority = controller, tenant, priority

    async def __aenter__(self) -> AdmissionSlot:
        controller, tenant = self._controller, self._tenant
        try:
            began_s = controller.queue.enter(tenant)
            if began_s is None:
                began_s = await controller.wait(tenant, self._priority())
        except Refusal as refusal:
            raise controller.refused(refusal.reason, refusal.after_s) from None
        self._began_s = began_s
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._controller.queue.leave(self._tenant, self._began_s)

    @property
    def is_charged(self) -> bool:
        """True if tokens are counted."""
        return self._tenant.is_rated

    def charge(self, tokens: int) -> None:
        """Count tokens against the tenant's rate, once they are known; may exceed it."""
        self._controller.queue.charge(self._tenant, tokens)


class ByteBudget:
    """A bound on the memory of all requests. Event loop thread only."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0

    def try_take(self, num_bytes: int) -> bool:
        """Hold `num_bytes` more; False, taking none, if the budget has no room for them."""
        if self.held + num_bytes > self.max_bytes:
            return False
        self.held += num_bytes
        return True

    def give(self, num_bytes: int) -> None:
        """Return `num_bytes`."""
        self.held -= num_bytes


def default_bytes() -> int:
    """A quarter of the memory of this machine, or of its container's limit."""
    return total_memory_bytes() // 4
