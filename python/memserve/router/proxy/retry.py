"""Tries a request on one set of instances after another, until it is answered or must not be tried again.

    select ── execute ──> the result
      ^          │ UpstreamFault
      │          ├─ one crashed at once, or two of one role ended, with the request ──> PoisonRequest
      │          ├─ no retry, time or instance is left ──> the fault
      └─ backoff ┘ the request under new names, or the rest of its stream

Knows no HTTP and no capacity. Event loop thread only.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from memserve.core.ids import InstanceId
from memserve.router.cluster.breaker import Breakers
from memserve.router.cluster.crashes import Crashes
from memserve.router.cluster.instance import ClusterSnapshot
from memserve.router.cluster.member import ProcessStatus
from memserve.router.cluster.registry import InstanceRegistry
from memserve.router.errors import (
    NoRoute,
    PoisonRequest,
    RequestAborted,
    RequestTimeout,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamFault,
)
from memserve.router.proxy.aborts import is_aborted
from memserve.router.proxy.client_errors import client_error
from memserve.router.proxy.names import renamed
from memserve.router.proxy.placement import GlobalScheduler, Placement
from memserve.router.proxy.prepare import PreparedRequest
from memserve.router.proxy.recovery_policy import Resumption
from memserve.router.request import GenerationRequest
from memserve.scheduling.context import Prompt
from memserve.scheduling.decision import Decision

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnPlaced = Callable[[Placement, int], None]
"""Told the instances of each attempt before it begins, and its number, from 1."""


class RequestObserver(Protocol):
    """Receives the outcomes of requests."""

    def count_placed(self, prompt: Prompt, sample: str | None) -> None:
        """A request was placed for the first time; its text begins with `sample`, if that is shown."""

    def count_retry(self, reason: str) -> None:
        """A request is tried again."""

    def count_poison(self) -> None:
        """A request was rejected as a poison request."""

    def count_resumed(self, outcome: str) -> None:
        """A broken stream was continued, repeated, refused, or diverged."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long, and how often, a request is tried."""

    timeout_s: float = 1800.0
    """For all attempts together."""
    max_retries: int = 3
    initial_backoff_s: float = 0.05
    max_backoff_s: float = 2.0
    poison_threshold: int = 2
    """Instances of one role that a request may lose before it is rejected as a poison request."""
    crash_window_s: float = 2.0
    """A request that an instance got so short before it crashed is rejected at once."""
    draw: Callable[[], float] = random.random
    """Jitter: numbers from 0 to 1."""


def backoff_s(policy: RetryPolicy, num_tries: int, left_s: float) -> float | None:
    """How long to wait after try number `num_tries`, from 1, until the next; None if there is no next.

    Between half of the backoff, which doubles with every try, and all of it. A request whose time would
    end during the backoff is not tried again.
    """
    if num_tries > policy.max_retries:
        return None
    backoff_s = min(policy.initial_backoff_s * 2.0 ** min(num_tries - 1, 60), policy.max_backoff_s)
    backoff_s = backoff_s * (1 + policy.draw()) / 2
    return backoff_s if backoff_s < left_s else None


def find_poison(faults: Sequence[UpstreamFault], threshold: int = 2) -> PoisonRequest | None:
    """Why a request that has met `faults` must reach no other instance; None if it may.

    Instances that were lost before they had the request do not count. Leave out the faults of instances
    that are alive.
    """
    lost: dict[str, dict[InstanceId, None]] = {}
    for fault in faults:
        if isinstance(fault, UpstreamDisconnected) and fault.was_sent:
            lost.setdefault(fault.role, {})[fault.instance_id] = None
    for role, instances in lost.items():
        if len(instances) >= threshold:
            return PoisonRequest(role, tuple(instances))
    return None


def find_crash(
    lost: Sequence[UpstreamDisconnected], crashes: Crashes, window_s: float
) -> PoisonRequest | None:
    """Why a request must reach no other instance after one crashed within `window_s` of getting it."""
    for fault in lost:
        crashed_s = crashes.time_of(fault.instance_id, fault.epoch)
        if crashed_s is not None and fault.was_sent and crashed_s - fault.sent_s <= window_s:
            return PoisonRequest(fault.role, (fault.instance_id,))
    return None


def retry_candidates(snapshot: ClusterSnapshot, failed: Sequence[InstanceId]) -> Iterator[ClusterSnapshot]:
    """The instances to choose from, best first: without those that failed; without the last of them; all.

    An instance that failed and is in `snapshot` may have been started anew.
    """
    for avoided in (failed, failed[-1:], ()):
        yield ClusterSnapshot.of(one for one in snapshot.all() if one.instance_id not in avoided)


@dataclass(frozen=True, slots=True)
class Attempt:
    """The request as the servers get it this time."""

    request: GenerationRequest
    resumption: Resumption | None = None
    """How its events continue those that the client has; None: from the beginning."""

    @classmethod
    def again(cls, request: GenerationRequest, resumption: Resumption | None = None) -> Attempt:
        """Under new names."""
        return cls(renamed(request), resumption)

    def to_place(self, prepared: PreparedRequest) -> PreparedRequest:
        """`prepared` with the prompt length of this attempt."""
        if self.resumption is None or not self.resumption.num_accepted:
            return prepared
        return prepared.resumed(self.resumption.num_tokens)


class RetryLoop:
    """See the module."""

    def __init__(
        self,
        cluster: InstanceRegistry,
        scheduler: GlobalScheduler,
        breakers: Breakers,
        policy: RetryPolicy,
        observer: RequestObserver,
    ) -> None:
        self._cluster = cluster
        self._scheduler = scheduler
        self._breakers = breakers
        self._policy = policy
        self._observer = observer

    def ready(self, prepared: PreparedRequest) -> ClusterSnapshot:
        """The instances that can serve the request now."""
        return prepared.eligible(self._cluster.snapshot)

    def decide(self, prepared: PreparedRequest) -> Decision:
        """Where the first attempt would go. Raises NoRoute."""
        ready = self.ready(prepared)
        decision = self._scheduler.decide(self._breakers.admitted(ready), prepared.prompt)
        if decision is None:
            raise _no_route(ready)
        return decision

    async def run(
        self,
        prepared: PreparedRequest,
        on_placed: OnPlaced,
        execute: Callable[[Attempt, Placement], Awaitable[T]],
        next_attempt: Callable[[UpstreamFault], Awaitable[Attempt]],
    ) -> T:
        """The result of `execute`, tried on other instances while instances fail.

        `next_attempt` gives the attempt after a fault, or raises what the client is told.
        Raises NoRoute, PoisonRequest, RequestAborted, RequestTimeout, UpstreamRejected for a fault that is
        the client's, the last fault, and any other error of `execute`.
        """
        request, faults = prepared.request, list[UpstreamFault]()
        attempt = Attempt(request)
        placement = self._place(self.ready(prepared), prepared)
        if placement is None:
            raise _no_route(self.ready(prepared))
        self._observer.count_placed(prepared.prompt, prepared.sample)
        timeout_s = min(self._policy.timeout_s, request.timeout_s or self._policy.timeout_s)
        ends_s = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(ends_s):
                while True:
                    on_placed(placement, len(faults) + 1)
                    try:
                        result = await execute(attempt, placement)
                    except UpstreamFault as fault:
                        if (error := client_error(request, fault)) is not None:
                            raise error from fault
                        if is_aborted(request):
                            raise RequestAborted from fault
                        faults.append(fault)
                        fault.num_attempts = len(faults)
                        self._count_fault(fault, placement)
                        await self._check_poison(faults)
                        attempt = await next_attempt(fault)
                        placement = await self._place_again(attempt.to_place(prepared), faults, ends_s)
                    else:
                        for instance in placement.instances:
                            self._breakers.answered(instance)
                        return result
        except TimeoutError as error:
            raise RequestTimeout(f"no answer within {timeout_s:g} s") from error

    async def _check_poison(self, faults: Sequence[UpstreamFault]) -> None:
        """Raises PoisonRequest as `find_poison`, once it is known which of the instances have ended.

        At once for an instance that crashed as soon as it had the request: a process that was killed from
        outside sends no notice of a crash.
        """
        clock = asyncio.get_running_loop().time
        until_s = clock() + self._cluster.suspect_after_s
        lost = [fault for fault in faults if isinstance(fault, UpstreamDisconnected)]
        if (suspect := find_crash(lost, self._cluster.crashes, self._policy.crash_window_s)) is not None:
            self._observer.count_poison()
            raise suspect from faults[-1]
        while True:
            statuses = [self._cluster.process_status(one.instance_id, one.epoch) for one in lost]
            ended, unknown = (
                [one for one, status in zip(lost, statuses, strict=True) if status is wanted]
                for wanted in (ProcessStatus.EXITED, ProcessStatus.UNKNOWN)
            )
            poison = find_poison([*ended, *unknown], self._policy.poison_threshold)
            if poison is None:
                return
            if find_poison(ended, self._policy.poison_threshold) is not None or clock() >= until_s:
                self._observer.count_poison()
                raise poison from faults[-1]
            await asyncio.sleep(0.05)

    async def _place_again(
        self, prepared: PreparedRequest, faults: Sequence[UpstreamFault], ends_s: float
    ) -> Placement:
        """Back off, then place the request again, avoiding failed instances.

        Raises the last fault when retries, time or instances run out.
        """
        fault, failed = faults[-1], [one.instance_id for one in faults]
        num_tries = len(faults)
        while True:
            left_s = ends_s - asyncio.get_running_loop().time()
            seconds = backoff_s(self._policy, num_tries, left_s)
            if seconds is None:
                raise fault
            await asyncio.sleep(seconds)
            if is_aborted(prepared.request):
                raise RequestAborted from fault
            num_tries += 1
            for snapshot in retry_candidates(self.ready(prepared), failed):
                placement = self._place(snapshot, prepared)
                if placement is not None:
                    self._observer.count_retry(fault.kind)
                    logger.warning(
                        "request retried rid=%s attempt=%d instances=%s reason=%s",
                        *(prepared.request.rid, len(faults) + 1, placement.route, fault),
                    )
                    return placement

    def _place(self, snapshot: ClusterSnapshot, prepared: PreparedRequest) -> Placement | None:
        placement = self._scheduler.place(self._breakers.admitted(snapshot), prepared.prompt)
        for instance in placement.instances if placement is not None else ():
            self._breakers.sent(instance)
        return placement

    def _count_fault(self, fault: UpstreamFault, placement: Placement) -> None:
        """Count it against its instance. A lost connection was counted when it was noticed, once for all."""
        if isinstance(fault, UpstreamError):
            for instance in placement.instances:
                if instance.instance_id == fault.instance_id:
                    self._breakers.failed(instance)


def _no_route(ready: ClusterSnapshot) -> NoRoute:
    return NoRoute(ready.unavailable_reason() or "no server is ready")
