"""A control link that loses, doubles and delays what it is told to, instead of waiting for it to happen.

    faults = Faults()
    link = FaultyLink(ControlClient(address), faults)
    faults.expect(Commit, Fault.LOSE_ANSWER)        the next Commit arrives, its answer does not
    faults.land()                                   what was delayed arrives now; nobody hears the answer
    faults.lose(0.01, PoolEvents)                   one in a hundred PoolEvents, and of their answers
    FaultyProxy(link).address                       the same for processes that are told this address

Knows no message's meaning.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from enum import StrEnum
from types import TracebackType
from typing import Protocol

from memserve.core.errors import InstanceLost, MemServeError
from memserve.wire.link import ControlServer
from memserve.wire.messages import Message

PROXY_TIMEOUT_S = 2.0
"""How long a server behind a `FaultyProxy` may take to answer: those who ask wait no longer either."""


class ControlLink(Protocol):
    """What `wire.link.ControlClient` does."""

    def request(self, message: Message, *, timeout_s: float) -> Message:
        """The answer. Raises InstanceLost if there is none."""
        ...

    def close(self) -> None:
        """Let go."""
        ...


class Fault(StrEnum):
    """What happens to one request."""

    NONE = "none"
    LOSE_REQUEST = "lose request"
    LOSE_ANSWER = "lose answer"
    DOUBLE = "double"
    """Its sender hears the second answer."""
    DELAY = "delay"
    """It arrives when `Faults.land` says so, long after its sender has given up."""


class Faults:
    """What is to go wrong with the next requests, of all links that share it. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected: list[tuple[type[Message] | None, Fault]] = []
        self._late: deque[tuple[ControlLink, Message, float]] = deque()
        self._random = random.Random()
        self._lossy: tuple[type[Message], ...] = ()
        self._share = 0.0
        self.num_seen = 0
        """Requests that were asked for."""
        self.num_lost = 0
        """Of them, those that `lose` has lost, one way or the other."""

    def expect(self, kind: type[Message] | None, *faults: Fault) -> None:
        """Let the next requests of that kind (None: of any) suffer these faults, in order."""
        with self._lock:
            self._expected += [(kind, fault) for fault in faults]

    def lose(self, share: float, *kinds: type[Message], seed: int = 0) -> None:
        """From now on lose that share of the requests of these kinds, and of the answers to them."""
        with self._lock:
            self._random = random.Random(seed)
            self._share, self._lossy = share, kinds

    def clear(self) -> None:
        """Let nothing go wrong any more; what is delayed stays."""
        with self._lock:
            self._expected.clear()
            self._share = 0.0

    @property
    def num_late(self) -> int:
        return len(self._late)

    def land(self, count: int | None = None) -> None:
        """Deliver what was delayed, oldest first."""
        for _ in range(self.num_late if count is None else min(count, self.num_late)):
            link, message, timeout_s = self._late.popleft()
            try:
                link.request(message, timeout_s=timeout_s)
            except MemServeError:
                continue

    def take(self, message: Message) -> Fault:
        """What happens to this request."""
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
        """Keep a request for `land`."""
        self._late.append((link, message, timeout_s))


class FaultyLink:
    """Asks through `inner`, if nothing goes wrong. What is lost is lost at once: nobody waits."""

    def __init__(
        self, inner: ControlLink, faults: Faults, *, on_lost: Callable[[float], object] = lambda _: None
    ) -> None:
        """`on_lost` gets the seconds that one would have waited in vain, to move a clock by."""
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
        """As `ControlClient.close`; what was delayed is never delivered then."""
        self._inner.close()


class FaultyProxy:
    """A control server that passes everything on through `link`, for processes that are told its address.

    What the link loses is never answered. One request at a time. A context manager.
    """

    def __init__(self, link: ControlLink) -> None:
        """Takes `link` and closes it in the end."""
        self._link = link
        self._server = ControlServer("127.0.0.1", 0, self._pass_on)
        self.address = self._server.address

    def close(self) -> None:
        """Pass nothing on any more. Idempotent."""
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
