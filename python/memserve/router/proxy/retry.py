"""Whether a request that an instance failed is done again: when, where, and under which name.

    fault ── wait_s ──> a wait ──> the first of `choices` that is whole ──> the call under an `AttemptId`
               └ None: the fault is what the client is told
Pure but for the names; randomness and time are given.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from msgspec import structs

from memserve.core.ids import InstanceId
from memserve.router.cluster.instance import ClusterSnapshot
from memserve.router.errors import PoisonRequest, UpstreamDisconnected, UpstreamFault
from memserve.router.request import GenerationRequest
from memserve.router.sse import EventSplitter

MAX_LOST = 2
"""So many instances of one role may be lost with a request on board."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long, and how often, a request is tried."""

    timeout_s: float = 1800.0
    """For all attempts together."""
    max_retries: int = 3
    initial_backoff_s: float = 0.05
    max_backoff_s: float = 2.0
    draw: Callable[[], float] = random.random
    """Jitter: numbers from 0 to 1."""


def backoff_s(patience: RetryPolicy, num_tries: int, left_s: float) -> float | None:
    """How long to wait after try number `num_tries`, from 1, until the next; None: there is none.

    Between half of the backoff, which doubles with every try, and all of it. Never past the client's
    time: rather than that, it is told at once.
    """
    if num_tries > patience.max_retries:
        return None
    backoff_s = min(patience.initial_backoff_s * 2.0 ** min(num_tries - 1, 60), patience.max_backoff_s)
    backoff_s = backoff_s * (1 + patience.draw()) / 2
    return backoff_s if backoff_s < left_s else None


def find_poison(faults: Sequence[UpstreamFault]) -> PoisonRequest | None:
    """Why a request that has met `faults` must reach no other instance; None if it may.

    An instance that was lost before the request had reached it was not lost for it; leave out the faults
    of those that live.
    """
    lost: dict[str, dict[InstanceId, None]] = {}
    for fault in faults:
        if isinstance(fault, UpstreamDisconnected) and fault.was_sent:
            lost.setdefault(fault.role, {})[fault.instance_id] = None
    for role, instances in lost.items():
        if len(instances) >= MAX_LOST:
            return PoisonRequest(role, tuple(instances))
    return None


def retry_candidates(snapshot: ClusterSnapshot, failed: Sequence[InstanceId]) -> Iterator[ClusterSnapshot]:
    """Whom to choose from, best first: none of those that failed; not the last of them; anyone.

    Whoever is in `snapshot` after it failed may have been started anew.
    """
    for avoided in (failed, failed[-1:], ()):
        yield ClusterSnapshot.of(one for one in snapshot.all() if one.instance_id not in avoided)


@dataclass(frozen=True, slots=True)
class AttemptId:
    """The name of a call at the servers, for one more attempt; the client keeps reading its own.

    SGLang refuses a name that it still knows, aborts by prefix, and 2 s after a stream has broken
    once more: what comes for the attempt before must not hit this one.
    """

    mark: str = field(default_factory=lambda: f"{secrets.token_hex(8)}-")

    def of(self, call: GenerationRequest) -> GenerationRequest:
        """`call` as the servers get it."""
        rids = tuple(self.mark + rid for rid in call.rids)
        return structs.replace(call, rid=self.mark + call.rid, rids=rids, rid_is_clients=False)

    def removed(self, answer: bytes) -> bytes:
        """A whole answer, or whole events, with the call's own name."""
        return answer.replace(b'"' + self.mark.encode(), b'"')

    def remover(self, write: Callable[[bytes], Awaitable[None]]) -> Callable[[bytes], Awaitable[None]]:
        """What writes the same of a stream to `write`."""
        splitter = EventSplitter()

        async def write_own(chunk: bytes) -> None:
            for event in splitter.feed(chunk):
                await write(self.removed(event))

        return write_own
