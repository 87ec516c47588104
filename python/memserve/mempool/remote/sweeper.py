"""A thread that runs a sweep whenever one is due. Knows nothing of what is swept."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Sweeper:
    """Runs `sweep`, which returns the seconds until it is due again."""

    def __init__(self, sweep: Callable[[], float], *, longest_s: float = 3600.0) -> None:
        """`longest_s`: time after which the next sweep begins at the latest."""
        self._longest_s = longest_s
        self._sweep = sweep
        self._woken = threading.Event()
        self._is_closing = False
        self._next = 0.0
        self._thread = threading.Thread(target=self._run, name="peer-sweeper", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Sweep now: there may be an earlier deadline than the last sweep knew of. Any thread."""
        self._woken.set()

    def expect(self, seconds: float) -> None:
        """A sweep is due in so many seconds at the latest. Any thread."""
        if time.monotonic() + seconds < self._next:
            self._woken.set()

    def close(self) -> None:
        """Stop after the running sweep. Idempotent."""
        self._is_closing = True
        self._woken.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._woken.clear()
                self._next = float("inf")  # A call of `expect` during the sweep triggers the next one.
                wait_s = min(self._sweep(), self._longest_s)
                self._next = time.monotonic() + wait_s
                self._woken.wait(wait_s)
        except Exception:
            logger.exception("the peers' sweeper failed; this process cannot go on")
            os._exit(1)
