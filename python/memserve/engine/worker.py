"""One thread that does what it is given, in order, and takes the process with it if that fails."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

logger = logging.getLogger(__name__)


class Worker:
    """See the module. Any thread may submit."""

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], object]) -> None:
        self._tasks.put(task)

    def drain(self) -> None:
        """Return when everything submitted so far is done."""
        if self._thread.is_alive():
            reached = threading.Event()
            self._tasks.put(reached.set)
            reached.wait()

    def close(self) -> None:
        """Do what was submitted, then end. Idempotent."""
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (task := self._tasks.get()) is not None:
                task()
        except Exception:
            logger.exception("a thread of the memory pool failed; this process cannot go on")
            os._exit(1)
