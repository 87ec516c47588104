"""The instances that told the router that they ended by themselves, as servers do that a request ends.

An instance that was killed from outside tells nothing. Knows no requests. Event loop thread only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from memserve.core.ids import Epoch, InstanceId


class Crashes:
    """The last `most` crashes, with their times."""

    def __init__(self, clock: Callable[[], float], most: int = 256) -> None:
        self._clock = clock
        self._most = most
        self._times: OrderedDict[tuple[InstanceId, Epoch], float] = OrderedDict()

    def add(self, instance_id: InstanceId, epoch: Epoch) -> None:
        """The process has crashed now. Idempotent."""
        self._times.setdefault((instance_id, epoch), self._clock())
        if len(self._times) > self._most:
            self._times.popitem(last=False)

    def time_of(self, instance_id: InstanceId, epoch: Epoch) -> float | None:
        """When the process crashed; None if it did not, or long ago."""
        return self._times.get((instance_id, epoch))
