"""A bound on the requests that run, and a bounded queue that is fair between tenants.

                  a slot is free                                       its slot
    enter ────────────────────────────────────────────────> running ───────────> leave
       └─ none ──> wait ── the turn of its tenant ─────────────^                   │
                    │ └─ the queue is full: the longest sub-queue drops its last <─┘ next turn
                    └─ abandon

A free slot goes to the tenant that has had the fewest slot-seconds over its weight since the queue was last
empty; a tenant that arrives later has no claim from before. A running request counts at once, with the
recent mean of its tenant's requests, and with its real time when it ends. Within a tenant, higher priorities
go first. When the queue is full, the tenant with the longest sub-queue, over its weight, yields.
Sources: start-time fair queueing (Goyal et al., 1996); longest queue drop (Suter et al., 1998).

Knows no HTTP, no keys and no event loop; clocks and callbacks are given.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

from memserve.router.tenant import Rates

LEARN = 0.1
"""Weight of the newest request in the moving mean of slot times."""
_ROUNDING = 1e-9


class Refusal(Exception):
    """A request that is not admitted now; nothing has changed. Retry after `after_s` seconds."""

    def __init__(self, reason: str, after_s: float) -> None:
        super().__init__(reason)
        self.reason = reason
        """requests, tokens, queue_full or queue_timeout."""
        self.after_s = after_s


class TokenBucket:
    """A token bucket that may go into debt: requests are charged once their cost is known.

    Source: the leaky bucket as a meter; ITU-T I.371. Times are the caller's, in seconds.
    """

    __slots__ = ("_burst", "_level", "_rate", "_seen_s")

    def __init__(self, rate: float, burst: float, now_s: float) -> None:
        """Starts full: `burst` may be taken at once, and `rate` is refilled per second."""
        self._rate, self._burst = rate, burst
        self._level, self._seen_s = burst, now_s

    def wait_s(self, now_s: float, needed: float) -> float:
        """Seconds until `needed` is available; 0.0 if it is now. `needed` is at most the burst."""
        level = min(self._burst, self._level + (now_s - self._seen_s) * self._rate)
        self._level, self._seen_s = level, now_s
        return 0.0 if level >= needed - _ROUNDING else (needed - level) / self._rate

    def take(self, amount: float) -> None:
        """Take `amount`, whether it is available or not."""
        self._level -= amount


@dataclass(slots=True, order=True)
class Waiter:
    """A request in the queue. Ordered as requests are served within a tenant."""

    rank: tuple[int, int]
    """(-priority, arrival)."""
    tenant: TenantQueue = field(compare=False)
    settled: Callable[[], None] = field(compare=False)
    """Called once, unless the request is abandoned, when one of these two is set:"""
    began_s: float | None = field(default=None, compare=False)
    """When it got its slot, which it has to leave."""
    refusal: Refusal | None = field(default=None, compare=False)


@dataclass(slots=True)
class TenantQueue:
    """The requests of one tenant that run and wait, and its use of slots. Belongs to a `FairQueue`."""

    name: str
    rates: Rates
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    running: int = 0
    waiting: list[Waiter] = field(default_factory=list)
    """In the order in which they are served."""
    had_s: float = 0.0
    """Slot-seconds of requests that ended in this busy time (since the queue was last empty)."""
    busy_time: int = 0
    began_s: float = 0.0
    """The sum of the begin times of running requests."""
    held_s: float = 1.0
    """Moving mean of the time that a request holds its slot, from an assumed first value."""
    is_rated: bool = False
    """True if any rate limit applies to it."""


class FairQueue:
    """See the module. One thread."""

    def __init__(
        self,
        max_running: int | None,
        max_waiting: int,
        clock: Callable[[], float],
        *,
        rates: Rates | None = None,
        burst: float = 1.0,
    ) -> None:
        """`max_running` None: no bound, and no request waits.

        `rates` limit all tenants together, who may send `burst` requests at once, if that is more.
        """
        self._max_running = math.inf if max_running is None else max_running
        self._max_waiting = max_waiting
        self._clock = clock
        self._all = TenantQueue("", rates or Rates(), *self._buckets(rates or Rates(), burst))
        self._tenants: dict[str, TenantQueue] = {}
        self._queued: dict[str, TenantQueue] = {}
        """The tenants with waiting requests."""
        self._arrivals = 0
        self._busy_time = 0
        self._level = 0.0
        """Slot-seconds over weight of the tenant that got the last slot in this busy time."""
        self.num_running = 0
        self.num_waiting = 0

    def tenant(self, name: str, rates: Rates) -> TenantQueue:
        """The queue of the tenant `name`, with these rates from now on."""
        tenant = self._tenants.get(name)
        if tenant is not None and tenant.rates is rates:
            return tenant
        if tenant is None:
            tenant = self._tenants[name] = TenantQueue(name, rates, *self._buckets(rates))
        elif tenant.rates != rates:
            tenant.rates, (tenant.requests, tenant.tokens) = rates, self._buckets(rates)
        tenant.is_rated = any((tenant.requests, tenant.tokens, self._all.requests, self._all.tokens))
        return tenant

    def enter(self, tenant: TenantQueue) -> float | None:
        """Start a request: its begin time, which `leave` takes; None if it has to `wait`.

        Raises Refusal if the tenant, or all tenants together, are over their rates.
        """
        now_s = self._clock()
        if tenant.is_rated:
            self._check_rates(tenant, now_s)
        if self.num_running >= self._max_running:
            return None
        if tenant.is_rated:
            self._pay(tenant)
        self._begin(tenant, now_s)
        return now_s

    def wait(self, tenant: TenantQueue, priority: int, settled: Callable[[], None]) -> Waiter:
        """Queue a request for which `enter` returned None. Raises Refusal if the queue has no room for it."""
        self._arrivals += 1
        waiter = Waiter((-priority, self._arrivals), tenant, settled)
        if not self.num_waiting:
            self._busy_time += 1
            self._level = 0.0
        if self.num_waiting >= self._max_waiting:
            self._make_place(waiter)
        self._join(tenant)
        insort(tenant.waiting, waiter)
        self._queued[tenant.name] = tenant
        self.num_waiting += 1
        if tenant.is_rated:
            self._pay(tenant)
        return waiter

    def abandon(self, waiter: Waiter) -> None:
        """Take a request out of the queue. Only before it is settled."""
        tenant = waiter.tenant
        tenant.waiting.remove(waiter)
        self._left_queue(tenant)

    def leave(self, tenant: TenantQueue, began_s: float) -> None:
        """A request has ended; the next waiting request gets its slot."""
        now_s = self._clock()
        held_s = now_s - began_s
        tenant.running -= 1
        tenant.began_s = tenant.began_s - began_s if tenant.running else 0.0
        tenant.had_s += held_s
        tenant.held_s += (held_s - tenant.held_s) * LEARN
        self._all.held_s += (held_s - self._all.held_s) * LEARN
        self.num_running -= 1
        if self.num_waiting:
            self._begin_next(now_s)

    def charge(self, tenant: TenantQueue, tokens: int) -> None:
        """Count the tokens of an admitted request."""
        for one in (tenant, self._all):
            if one.tokens is not None:
                one.tokens.take(tokens)

    def retry_after_s(self) -> float:
        """Estimated seconds until a request at the end of the queue would get a slot."""
        if math.isinf(self._max_running):
            return 1.0
        return min(600.0, (self.num_waiting + 1) * self._all.held_s / self._max_running)

    # ---- rates

    def _buckets(self, rates: Rates, burst: float = 1.0) -> tuple[TokenBucket | None, TokenBucket | None]:
        now_s = self._clock()
        requests, tokens = (
            None if math.isinf(rate) else TokenBucket(rate, max(least, rate), now_s)
            for rate, least in ((rates.rps, burst), (rates.tps, 1.0))
        )
        return requests, tokens

    def _check_rates(self, tenant: TenantQueue, now_s: float) -> None:
        for one in (tenant, self._all):
            if one.requests is not None and (wait_s := one.requests.wait_s(now_s, 1.0)):
                raise Refusal("requests", wait_s)
            if one.tokens is not None and (wait_s := one.tokens.wait_s(now_s, 1.0)):
                raise Refusal("tokens", wait_s)

    def _pay(self, tenant: TenantQueue) -> None:
        for one in (tenant, self._all):
            if one.requests is not None:
                one.requests.take(1.0)

    # ---- turns

    def _begin(self, tenant: TenantQueue, now_s: float) -> None:
        tenant.running += 1
        tenant.began_s += now_s
        self.num_running += 1

    def _begin_next(self, now_s: float) -> None:
        """Give the free slot to the tenant that has had the least."""
        had, _, tenant = min(
            (self._had(one, now_s), one.waiting[0].rank[1], one) for one in self._queued.values()
        )
        self._level = max(self._level, had)
        waiter = tenant.waiting.pop(0)
        self._left_queue(tenant)
        self._begin(tenant, now_s)
        waiter.began_s = now_s
        waiter.settled()

    def _had(self, tenant: TenantQueue, now_s: float) -> float:
        """Slot-seconds over weight, in this busy time."""
        self._join(tenant)
        running_s = max(tenant.running * tenant.held_s, tenant.running * now_s - tenant.began_s)
        return (tenant.had_s + running_s) / tenant.rates.weight

    def _join(self, tenant: TenantQueue) -> None:
        """Forget slot-seconds from before this busy time, and claims from idle time within it."""
        if tenant.busy_time != self._busy_time:
            tenant.busy_time, tenant.had_s = self._busy_time, 0.0
        if not tenant.running and not tenant.waiting:
            tenant.had_s = max(tenant.had_s, self._level * tenant.rates.weight)

    # ---- the queue

    def _make_place(self, waiter: Waiter) -> None:
        """Drop a waiting request for `waiter`, or raise Refusal."""
        own = waiter.tenant
        refusal = Refusal("queue_full", self.retry_after_s())
        longest = max(self._queued.values(), key=_length, default=None)
        if longest is None:
            raise refusal
        is_owed = (len(own.waiting) + 1) / own.rates.weight < _length(longest)
        if not is_owed:
            longest = own
            if not own.waiting or own.waiting[-1] < waiter:
                raise refusal
        last = longest.waiting.pop()
        self._left_queue(longest)
        last.refusal = refusal
        last.settled()

    def _left_queue(self, tenant: TenantQueue) -> None:
        self.num_waiting -= 1
        if not tenant.waiting:
            del self._queued[tenant.name]


def _length(tenant: TenantQueue) -> float:
    return len(tenant.waiting) / tenant.rates.weight
