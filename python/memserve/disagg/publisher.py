"""Tells the router what a pool holds: its events as they come, a snapshot whenever one is missing.

    in step:      events since the last time ──> Done
    out of step:  all that is cached, in parts ──> Done, and in step again

Whatever goes wrong (a router that restarts, a lost answer, too much at once) ends in a snapshot: the
router may lack something for a moment, but never believes what is not so for long.
Knows the pool by two functions, and no blocks.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator

from memserve.core.cache_events import CacheEvent, Snapshot, Stored
from memserve.core.errors import MemServeError
from memserve.core.ids import Epoch
from memserve.wire.link import ControlClient
from memserve.wire.messages import Done, Message, PoolEvents, SnapshotPart

logger = logging.getLogger(__name__)

PERIOD_S = 0.02
"""How old news may be; events in between are sent together."""
RETRY_S = 0.5
ANSWER_TIMEOUT_S = 2.0
MAX_KEYS = 1 << 16
"""In one message: 2 MiB."""


class Publisher:
    """Sends on a thread of its own, from `start` to `close`."""

    def __init__(
        self,
        client: ControlClient,
        epoch: Epoch,
        take_events: Callable[[], list[CacheEvent]],
        snapshot: Callable[[], Snapshot],
    ) -> None:
        """Takes `client` and closes it in the end."""
        self._client = client
        self._epoch = epoch
        self._take_events = take_events
        self._snapshot = snapshot
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mempool-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Say nothing more. Idempotent."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            in_step, wait_s = False, PERIOD_S
            while not self._closing.wait(wait_s):
                in_step = self._publish() if in_step else self._begin_anew()
                wait_s = PERIOD_S if in_step else RETRY_S
            self._client.close()
        except Exception:
            logger.exception("the publisher of the memory pool failed; this process cannot go on")
            os._exit(1)

    def _publish(self) -> bool:
        """Send what is new; whether the router has all of it."""
        events = self._take_events()
        if not events:
            return True
        if sum(len(event.keys) for event in events) > MAX_KEYS:
            return self._begin_anew()
        return isinstance(self._tell(PoolEvents(self._epoch, tuple(events))), Done)

    def _begin_anew(self) -> bool:
        """Send everything; whether the router has it."""
        snapshot = self._snapshot()
        return all(isinstance(self._tell(part), Done) for part in parts(self._epoch, snapshot))

    def _tell(self, message: Message) -> Message | None:
        try:
            return self._client.request(message, timeout_s=ANSWER_TIMEOUT_S)
        except MemServeError as error:
            logger.debug("events not sent: %s", error)
            return None


def parts(epoch: Epoch, snapshot: Snapshot, max_keys: int = MAX_KEYS) -> Iterator[SnapshotPart]:
    """The messages that a snapshot is sent in: at least one. Pure."""
    index, room = 0, max_keys
    chains: list[Stored] = []
    for chain in snapshot.chains:
        parent, keys = chain.parent, chain.keys
        while keys:
            chains.append(Stored(0, chain.tier, parent, keys[:room]))
            parent, keys, room = keys[min(room, len(keys)) - 1], keys[room:], room - len(chains[-1].keys)
            if not room:
                yield SnapshotPart(epoch, snapshot.sequence, index, False, tuple(chains))
                index, room, chains = index + 1, max_keys, []
    yield SnapshotPart(epoch, snapshot.sequence, index, True, tuple(chains))
