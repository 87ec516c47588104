"""Who runs now and who waits: a bound on what runs, and a bounded queue that is fair between tenants.

                  a slot is free                                   its slot
    enter ────────────────────────────────────────────> running ───────────> leave
       └─ none ──> wait ── its tenant's turn ──────────────^                   │
                    │ └─ the queue is full: refused, who waits most for      <─┘ whose turn is it?
                    └─ abandon

The next slot goes to the tenant that has had the least of them, in slot-seconds over its weight, since
somebody first had to wait; a tenant that comes later is owed nothing from before. What runs counts at
once, as what its tenant's requests took of late, and as what it took when it ends. Within a tenant, higher
priorities go first. When the queue is full, it is the longest share of it that yields.
Sources: start-time fair queueing (Goyal et al., 1996); longest queue drop (Suter et al., 1998).

Knows no HTTP, no keys and no event loop; clocks and callbacks are given.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

from memserve.router.admission.rates import Rates, TokenBucket

FIRST_HELD_S = 1.0
"""What a request is taken to hold its slot for while none has ended."""
LEARN = 0.1
"""How much of the last request's time goes into what the next is expected to take."""
MAX_RETRY_S = 600.0


class Refusal(Exception):
    """Not now: nothing has changed. `after_s` is when it may be worth another try."""

    def __init__(self, reason: str, after_s: float) -> None:
        super().__init__(reason)
        self.reason = reason
        """requests, tokens or queue_full."""
        self.after_s = after_s


@dataclass(slots=True, order=True)
class Waiter:
    """Somebody in the queue. Ordered as they are served within a tenant."""

    rank: tuple[int, int]
    """(-priority, arrival)."""
    share: TenantQueue = field(compare=False)
    settled: Callable[[], None] = field(compare=False)
    """Called once, unless it is abandoned, when one of these is known:"""
    began_s: float | None = field(default=None, compare=False)
    """It has a slot, which it has to leave."""
    refusal: Refusal | None = field(default=None, compare=False)


@dataclass(slots=True)
class TenantQueue:
    """What one tenant has, and has had. Belongs to an `FairQueue`."""

    name: str
    rates: Rates
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    running: int = 0
    waiting: list[Waiter] = field(default_factory=list)
    """The next one first."""
    had_s: float = 0.0
    """Slot-seconds of what has ended in this busy time."""
    busy_time: int = 0
    began_s: float = 0.0
    """The sum of when each of those that run began."""
    held_s: float = FIRST_HELD_S
    """What a request holds its slot for, of late."""
    is_rated: bool = False
    """Whether any rate holds for it."""


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
        """`max_running` None: no bound, and nobody waits.

        `rates` hold for all tenants together; `burst` of their requests may come at once, if that is more.
        """
        self._max_running = math.inf if max_running is None else max_running
        self._max_waiting = max_waiting
        self._clock = clock
        self._all = TenantQueue("", rates or Rates(), *self._buckets(rates or Rates(), burst))
        self._shares: dict[str, TenantQueue] = {}
        self._queued: dict[str, TenantQueue] = {}
        """Those that have somebody waiting."""
        self._arrivals = 0
        self._busy_time = 0
        self._level = 0.0
        """What a tenant has had, over its weight, when it last got a slot in this busy time."""
        self.num_running = 0
        self.num_waiting = 0

    def share(self, name: str, rates: Rates) -> TenantQueue:
        """The share of a tenant, with these rates from now on."""
        share = self._shares.get(name)
        if share is not None and share.rates is rates:
            return share
        if share is None:
            share = self._shares[name] = TenantQueue(name, rates, *self._buckets(rates))
        elif share.rates != rates:
            share.rates, (share.requests, share.tokens) = rates, self._buckets(rates)
        share.is_rated = any((share.requests, share.tokens, self._all.requests, self._all.tokens))
        return share

    def enter(self, share: TenantQueue) -> float | None:
        """When it began, if it runs now, which `leave` has to be told; None if it has to wait.

        Raises Refusal if its tenant, or all together, are over their rates.
        """
        now_s = self._clock()
        if share.is_rated:
            self._check_rates(share, now_s)
        if self.num_running >= self._max_running:
            return None
        if share.is_rated:
            self._pay(share)
        self._begin(share, now_s)
        return now_s

    def wait(self, share: TenantQueue, priority: int, settled: Callable[[], None]) -> Waiter:
        """Queue up, after `enter` has said None. Raises Refusal if the queue has no place for it."""
        self._arrivals += 1
        waiter = Waiter((-priority, self._arrivals), share, settled)
        if not self.num_waiting:
            self._busy_time += 1
            self._level = 0.0
        if self.num_waiting >= self._max_waiting:
            self._make_place(waiter)
        self._join(share)
        insort(share.waiting, waiter)
        self._queued[share.name] = share
        self.num_waiting += 1
        if share.is_rated:
            self._pay(share)
        return waiter

    def abandon(self, waiter: Waiter) -> None:
        """It does not want to wait any longer. Only while it is not settled."""
        share = waiter.share
        share.waiting.remove(waiter)
        self._left_queue(share)

    def leave(self, share: TenantQueue, began_s: float) -> None:
        """A request has ended; its slot is somebody else's."""
        now_s = self._clock()
        held_s = now_s - began_s
        share.running -= 1
        share.began_s = share.began_s - began_s if share.running else 0.0
        share.had_s += held_s
        share.held_s += (held_s - share.held_s) * LEARN
        self._all.held_s += (held_s - self._all.held_s) * LEARN
        self.num_running -= 1
        if self.num_waiting:
            self._begin_next(now_s)

    def charge(self, share: TenantQueue, tokens: int) -> None:
        """Count the tokens of a request that was let in."""
        for one in (share, self._all):
            if one.tokens is not None:
                one.tokens.take(tokens)

    def retry_after_s(self) -> float:
        """When a slot may be free for one that comes behind all who wait now."""
        if math.isinf(self._max_running):
            return 1.0
        return min(MAX_RETRY_S, (self.num_waiting + 1) * self._all.held_s / self._max_running)

    # ---- rates

    def _buckets(self, rates: Rates, burst: float = 1.0) -> tuple[TokenBucket | None, TokenBucket | None]:
        now_s = self._clock()
        requests, tokens = (
            None if math.isinf(rate) else TokenBucket(rate, max(least, rate), now_s)
            for rate, least in ((rates.rps, burst), (rates.tps, 1.0))
        )
        return requests, tokens

    def _check_rates(self, share: TenantQueue, now_s: float) -> None:
        for one in (share, self._all):
            if one.requests is not None and (wait_s := one.requests.wait_s(now_s, 1.0)):
                raise Refusal("requests", wait_s)
            if one.tokens is not None and (wait_s := one.tokens.wait_s(now_s, 1.0)):
                raise Refusal("tokens", wait_s)

    def _pay(self, share: TenantQueue) -> None:
        for one in (share, self._all):
            if one.requests is not None:
                one.requests.take(1.0)

    # ---- turns

    def _begin(self, share: TenantQueue, now_s: float) -> None:
        share.running += 1
        share.began_s += now_s
        self.num_running += 1

    def _begin_next(self, now_s: float) -> None:
        """Give the slot that has come free to whoever has had the least."""
        had, _, share = min(
            (self._had(one, now_s), one.waiting[0].rank[1], one) for one in self._queued.values()
        )
        self._level = max(self._level, had)
        waiter = share.waiting.pop(0)
        self._left_queue(share)
        self._begin(share, now_s)
        waiter.began_s = now_s
        waiter.settled()

    def _had(self, share: TenantQueue, now_s: float) -> float:
        """Slot-seconds over weight, in this busy time."""
        self._join(share)
        running_s = max(share.running * share.held_s, share.running * now_s - share.began_s)
        return (share.had_s + running_s) / share.rates.weight

    def _join(self, share: TenantQueue) -> None:
        """What it has had before this busy time, or has missed in it, counts no more."""
        if share.busy_time != self._busy_time:
            share.busy_time, share.had_s = self._busy_time, 0.0
        if not share.running and not share.waiting:
            share.had_s = max(share.had_s, self._level * share.rates.weight)

    # ---- the queue

    def _make_place(self, waiter: Waiter) -> None:
        """Take the place of one who waits, or raise Refusal."""
        own = waiter.share
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

    def _left_queue(self, share: TenantQueue) -> None:
        self.num_waiting -= 1
        if not share.waiting:
            del self._queued[share.name]


def _length(share: TenantQueue) -> float:
    return len(share.waiting) / share.rates.weight
