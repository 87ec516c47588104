"""Background push of cached chains to peer pools. Serial and best effort.

A full queue drops the push and counts it: the receiver has to recompute the blocks, no more.
The sending thread has a lower priority than the engine's. Knows no pools and no sockets.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from memserve.core.block_keys import BlockKey
from memserve.core.errors import MemServeError
from memserve.core.executor import BoundedExecutor
from memserve.wire.messages import PoolInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PushTask:
    """A chain that `to` may lack. keys[0] follows `parent`, or begins a prompt."""

    to: PoolInfo
    keys: Sequence[BlockKey]
    parent: BlockKey | None


@dataclass(frozen=True, slots=True)
class PushStats:
    """Push tasks by outcome since the start; `waiting` is the current number."""

    sent: int = 0
    blocks: int = 0
    """Blocks that the receivers lacked and now have."""
    dropped: int = 0
    """Tasks that were not tried: the queue was full."""
    failed: int = 0
    waiting: int = 0
    """Tasks in the queue, the running one included."""


class PushQueue:
    """Runs push tasks in order on one thread. Any thread may call any method."""

    def __init__(self, push: Callable[[PushTask], int], capacity: int = 256, *, niceness: int = 10) -> None:
        """`push` sends one chain and returns the number of blocks sent; a MemServeError is a failure.

        `niceness`: of the sending thread, above that of the engine's threads.
        """
        self._push = push
        self._executor = BoundedExecutor("mempool-push", capacity=capacity, niceness=niceness)
        self._lock = threading.Lock()
        self._stats = PushStats()

    def offer(self, task: PushTask) -> bool:
        """Queue the task; False if the queue is full, which is counted."""
        return self._executor.execute(lambda: self._run(task))

    def stats(self) -> PushStats:
        """All counts of one moment."""
        queued = self._executor.stats()
        with self._lock:
            return replace(self._stats, dropped=queued.refused, waiting=queued.waiting + queued.running)

    def forget(self) -> None:
        """Drop the waiting tasks and return when no task is running."""
        self._executor.drop_waiting()
        self._executor.drain()

    def close(self) -> None:
        """End after the running task; drop the others. Idempotent."""
        self._executor.close()

    def _run(self, task: PushTask) -> None:
        try:
            num_blocks = self._push(task)
        except MemServeError as error:
            logger.warning("blocks not sent to=%s num=%d: %s", task.to.instance_id, len(task.keys), error)
            with self._lock:
                self._stats = replace(self._stats, failed=self._stats.failed + 1)
            return
        with self._lock:
            sent, blocks = self._stats.sent + 1, self._stats.blocks + num_blocks
            self._stats = replace(self._stats, sent=sent, blocks=blocks)
