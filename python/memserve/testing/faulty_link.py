"""A control link that loses, doubles and delays chosen requests.

    faults = Faults()
    link = FaultyLink(ControlClient(address), faults)
    faults.expect(Commit, Fault.LOSE_ANSWER)        the next Commit arrives, its answer does not
    faults.land()                                   delayed requests arrive now; their answers are dropped
    faults.lose(0.01, PoolEvents)                   one in a hundred PoolEvents, and of their answers
    FaultyProxy(link).address                       the same for processes that use this address

Knows no meaning of any message.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from enum import StrEnum
from types import TracebackType

from memserve.core.errors import InstanceLost, MemServeError
from memserve.wire.link import ControlLink, ControlServer
from memserve.wire.messages import Message

PROXY_TIMEOUT_S = 2.0
"""Timeout of a server behind a `FaultyProxy`; clients wait no longer either."""


class Fault(StrEnum):
    """The fault of one request."""

    NONE = "none"
    LOSE_REQUEST = "lose request"
    LOSE_ANSWER = "lose answer"
    DOUBLE = "double"
    """The request arrives twice; its sender receives the second answer."""
    DELAY = "delay"
    """The request arrives at the next `Faults.land`, long after its sender has given up."""


class Faults:
    """The faults of the next requests on all links that share this object. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected: list[tuple[type[Message] | None, Fault]] = []
        self._late: deque[tuple[ControlLink, Message, float]] = deque()
        self._random = random.Random()
        self._lossy: tuple[type[Message], ...] = ()
        self._share = 0.0
        self.num_seen = 0
        """Number of requests."""
        self.num_lost = 0
        """Number of requests that `lose` has lost, or their answer."""

    def expect(self, kind: type[Message] | None, *faults: Fault) -> None:
        """Give the next requests of type `kind` (None: any type) these faults, in order."""
        with self._lock:
            self._expected += [(kind, fault) for fault in faults]

    def lose(self, share: float, *kinds: type[Message], seed: int = 0) -> None:
        """From now on lose this share of the requests of these types, and of their answers."""
        with self._lock:
            self._random = random.Random(seed)
            self._share, self._lossy = share, kinds

    def clear(self) -> None:
        """End all faults. Delayed requests stay delayed."""
        with self._lock:
            self._expected.clear()
            self._share = 0.0

    @property
    def num_late(self) -> int:
        return len(self._late)

    def land(self, count: int | None = None) -> None:
        """Deliver delayed requests, oldest first; `count` of them, or all."""
        for _ in range(self.num_late if count is None else min(count, self.num_late)):
            link, message, timeout_s = self._late.popleft()
            try:
                link.request(message, timeout_s=timeout_s)
            except MemServeError:
                continue

    def take(self, message: Message) -> Fault:
        """The fault of this request. Removes it from the expected ones."""
        with self._lock:
            self.num_seen += 1
            for i, (kind, fault) in enumerate(self._expected):
                if kind is None or isinstance(message, kind):
                    del self._expected[i]
                    return fault
            if self._share and isinstance(message, self._lossy):
                for fault in (Fault.LOSE_REQUEST, Fault.LOSE_ANSWER):
                    if self._random.random() < self._share:
                        self.num_lost += 1
                        return fault
        return Fault.NONE

    def delay(self, link: ControlLink, message: Message, timeout_s: float) -> None:
        """Keep a request until `land`."""
        self._late.append((link, message, timeout_s))


class FaultyLink:
    """Sends requests through `inner`, with faults. A lost request fails at once, without a wait."""

    def __init__(
        self, inner: ControlLink, faults: Faults, *, on_lost: Callable[[float], object] = lambda _: None
    ) -> None:
        """`on_lost` receives the timeout of each lost request, for example to advance a clock by it."""
        self._inner = inner
        self._faults = faults
        self._on_lost = on_lost

    def request(self, message: Message, *, timeout_s: float) -> Message:
        """As `ControlClient.request`."""
        fault = self._faults.take(message)
        if fault is Fault.LOSE_REQUEST:
            self._on_lost(timeout_s)
            raise InstanceLost("a faulty link", "the request was lost")
        if fault is Fault.DELAY:
            self._faults.delay(self._inner, message, timeout_s)
            raise InstanceLost("a faulty link", "the request is late")
        answer = self._inner.request(message, timeout_s=timeout_s)
        if fault is Fault.DOUBLE:
            answer = self._inner.request(message, timeout_s=timeout_s)
        if fault is Fault.LOSE_ANSWER:
            self._on_lost(timeout_s)
            raise InstanceLost("a faulty link", "the answer was lost")
        return answer

    def close(self) -> None:
        """As `ControlClient.close`. Delayed requests are never delivered after it."""
        self._inner.close()


class FaultyProxy:
    """A control server that forwards every request through `link`, for processes that use its address.

    A request that the link loses is never answered. One request at a time. A context manager.
    """

    def __init__(self, link: ControlLink) -> None:
        """Owns `link`: `close` closes it."""
        self._link = link
        self._server = ControlServer("127.0.0.1", 0, self._pass_on)
        self.address = self._server.address

    def close(self) -> None:
        """Stop forwarding. Idempotent."""
        self._server.close()
        self._link.close()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pass_on(self, message: Message) -> Message | Future[Message]:
        try:
            return self._link.request(message, timeout_s=PROXY_TIMEOUT_S)
        except InstanceLost:
            return Future()
