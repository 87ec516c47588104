"""Sends cached chains to other pools behind the engine's back: one at a time, late, or not at all.

Bounded: what does not fit is dropped and counted, since it costs the receiver a recomputation and
nothing else. Its thread yields to every other one. Knows no pools and no sockets.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, Full, Queue

from memserve.core.block_keys import BlockKey
from memserve.core.errors import MemServeError
from memserve.wire.messages import PoolInfo

logger = logging.getLogger(__name__)

NICENESS = 10
"""Of the sending thread, above that of the engine's threads."""
CAPACITY = 256


@dataclass(frozen=True, slots=True)
class PushTask:
    """A chain that `to` may lack. keys[0] comes after `parent`, or begins a prompt."""

    to: PoolInfo
    keys: Sequence[BlockKey]
    parent: BlockKey | None


@dataclass(frozen=True, slots=True)
class PushStats:
    """Errands and their outcome; `waiting` is of this moment."""

    sent: int = 0
    blocks: int = 0
    """That the receivers lacked, and now have."""
    dropped: int = 0
    """Not even tried: too many were waiting."""
    failed: int = 0
    waiting: int = 0


class PushQueue:
    """Errands, run in order on one thread. `offer` may be called by any thread."""

    def __init__(self, run: Callable[[PushTask], int], capacity: int = CAPACITY) -> None:
        """`run` sends one and returns how many blocks that were; a MemServeError is a failure."""
        self._send = run
        self._errands: Queue[PushTask] = Queue(capacity)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._stats = PushStats()
        self._unfinished = 0
        self._idle = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="mempool-outbox", daemon=True)
        self._thread.start()

    def offer(self, errand: PushTask) -> bool:
        """Queue it; False, and counted, if there is no room."""
        with self._lock:
            try:
                self._errands.put_nowait(errand)
            except Full:
                self._stats = replace(self._stats, dropped=self._stats.dropped + 1)
                return False
            self._unfinished += 1
            return True

    def stats(self) -> PushStats:
        with self._lock:
            return replace(self._stats, waiting=self._unfinished)

    def forget(self) -> None:
        """Drop what waits, and return when nothing is being sent."""
        with self._idle:
            while True:
                try:
                    self._errands.get_nowait()
                except Empty:
                    break
                self._unfinished -= 1
            self._idle.wait_for(lambda: not self._unfinished)

    def close(self) -> None:
        """Send nothing more. Idempotent."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            while not self._closing.is_set():
                try:
                    errand = self._errands.get(timeout=0.1)
                except Empty:
                    continue
                self._done(self._blocks_sent(errand))
        except Exception:
            logger.exception("the outbox of the memory pool failed; this process cannot go on")
            os._exit(1)

    def _blocks_sent(self, errand: PushTask) -> int | None:
        try:
            return self._send(errand)
        except MemServeError as error:
            logger.warning("blocks not sent to=%s num=%d: %s", errand.to.instance_id, len(errand.keys), error)
            return None

    def _done(self, num_blocks: int | None) -> None:
        with self._idle:
            stats = self._stats
            if num_blocks is None:
                self._stats = replace(stats, failed=stats.failed + 1)
            else:
                self._stats = replace(stats, sent=stats.sent + 1, blocks=stats.blocks + num_blocks)
            self._unfinished -= 1
            self._idle.notify_all()
