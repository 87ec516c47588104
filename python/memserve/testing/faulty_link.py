"""A control link that loses, doubles and delays what it is told to, instead of waiting for it to happen.

    faults = Faults()
    link = FaultyLink(ControlClient(address), faults)
    faults.expect(Commit, Fault.LOSE_ANSWER)        the next Commit arrives, its answer does not
    faults.land()                                   what was delayed arrives now; nobody hears the answer

Knows no message's meaning.
"""

from __future__ import annotations

import threading
from collections import deque
from enum import StrEnum
from typing import Protocol

from memserve.core.errors import InstanceLost, MemServeError
from memserve.wire.messages import Message


class Link(Protocol):
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
        self._late: deque[tuple[Link, Message, float]] = deque()
        self.num_seen = 0
        """Requests that were asked for."""

    def expect(self, kind: type[Message] | None, *faults: Fault) -> None:
        """Let the next requests of that kind (None: of any) suffer these faults, in order."""
        with self._lock:
            self._expected += [(kind, fault) for fault in faults]

    def clear(self) -> None:
        """Let nothing go wrong any more; what is delayed stays."""
        with self._lock:
            self._expected.clear()

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
        return Fault.NONE

    def delay(self, link: Link, message: Message, timeout_s: float) -> None:
        """Keep a request for `land`."""
        self._late.append((link, message, timeout_s))


class FaultyLink:
    """Asks through `inner`, if nothing goes wrong. What is lost is lost at once: nobody waits."""

    def __init__(self, inner: Link, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    def request(self, message: Message, *, timeout_s: float) -> Message:
        """As `ControlClient.request`."""
        fault = self._faults.take(message)
        if fault is Fault.LOSE_REQUEST:
            raise InstanceLost("a faulty link", "the request was lost")
        if fault is Fault.DELAY:
            self._faults.delay(self._inner, message, timeout_s)
            raise InstanceLost("a faulty link", "the request is late")
        answer = self._inner.request(message, timeout_s=timeout_s)
        if fault is Fault.DOUBLE:
            answer = self._inner.request(message, timeout_s=timeout_s)
        if fault is Fault.LOSE_ANSWER:
            raise InstanceLost("a faulty link", "the answer was lost")
        return answer

    def close(self) -> None:
        """As `ControlClient.close`; what was delayed is never delivered then."""
        self._inner.close()
