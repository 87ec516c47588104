"""A bounded queue of calls and the threads that run them.

    execute(call)   no result; any exception ends the process
    submit(call)    a Future; a MemServeError fails the future, any other exception ends the process

A call that does not fit is refused at once. Threads start when they are first needed.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from memserve.core.errors import MemServeError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ExecutorStats:
    """Calls of one executor at one moment."""

    running: int
    waiting: int
    refused: int
    """Since the start: the executor was full or closed."""


class BoundedExecutor:
    """Any thread may call any method. Calls start in the order in which they were accepted."""

    def __init__(self, name: str, *, capacity: int, workers: int = 1, niceness: int = 0) -> None:
        """`capacity`: accepted calls that have not ended. `niceness`: added to that of the worker threads."""
        self._name = name
        self._capacity = capacity
        self._num_workers = workers
        self._niceness = niceness
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._progress = threading.Condition(self._lock)
        self._waiting: deque[tuple[Callable[[], object], Future[object] | None]] = deque()
        self._num_running = 0
        self._num_refused = 0
        self._is_closed = False
        self._threads: list[threading.Thread] = []

    def execute(self, call: Callable[[], object]) -> bool:
        """Queue `call`; False if the executor is full or closed. An exception of `call` ends the process."""
        return self._accept(call, None)

    def submit(self, call: Callable[[], Result]) -> Future[Result] | None:
        """Queue `call` and return its future; None if the executor is full or closed.

        `close` and `drop_waiting` cancel the future of a call that has not started.
        """
        future: Future[Result] = Future()
        return future if self._accept(call, future) else None  # type: ignore[arg-type]

    def stats(self) -> ExecutorStats:
        """All counts of one moment."""
        with self._lock:
            return ExecutorStats(self._num_running, len(self._waiting), self._num_refused)

    def drop_waiting(self) -> None:
        """Drop all calls that have not started."""
        with self._lock:
            dropped, self._waiting = self._waiting, deque()
            self._progress.notify_all()
        for _, future in dropped:
            if future is not None:
                future.cancel()

    def drain(self) -> None:
        """Return when no call is running or waiting."""
        with self._lock:
            self._progress.wait_for(lambda: not self._num_running and not self._waiting)

    def close(self) -> None:
        """Accept no more calls, drop those that wait, and wait for the running ones. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._work.notify_all()
        self.drop_waiting()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _accept(self, call: Callable[[], object], future: Future[object] | None) -> bool:
        with self._lock:
            num_unfinished = self._num_running + len(self._waiting)
            if self._is_closed or num_unfinished >= self._capacity:
                self._num_refused += 1
                return False
            self._waiting.append((call, future))
            if len(self._threads) < min(self._num_workers, num_unfinished + 1):
                name = f"{self._name}-{len(self._threads)}" if self._num_workers > 1 else self._name
                self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
                self._threads[-1].start()
            self._work.notify()
            return True

    def _run(self) -> None:
        try:
            if self._niceness:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
            while self._run_next():
                pass
        except Exception:
            logger.exception("a thread of executor=%s failed; this process cannot go on", self._name)
            os._exit(1)

    def _run_next(self) -> bool:
        """Wait for a call and run it; False once the executor is closed."""
        with self._lock:
            self._work.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return False
            self._num_running += 1
            call, future = self._waiting.popleft()
        if future is None:
            call()
        elif future.set_running_or_notify_cancel():
            _complete(future, call)
        with self._lock:
            self._num_running -= 1
            self._progress.notify_all()
        return True


def _complete(future: Future[object], call: Callable[[], object]) -> None:
    try:
        result = call()
    except MemServeError as error:
        future.set_exception(error)
    else:
        future.set_result(result)
