"""Reports the content of a pool to the router: events as they come, a snapshot when events were lost.

    reach     nothing ──> Unknown: later; anything else: send a snapshot, in parts, and be in step
    in step   events since the last time, or nothing once a second ──> Done
                                                                   ──> AuditWanted: a snapshot to compare
              SnapshotWanted, Unknown, too much at once ──> reach

An unanswered message is repeated unchanged until it is answered: the router skips events that it knows,
and the pool keeps the net effect of changes meanwhile. So a lost message costs its repetition, never a
snapshot. Knows the pool by two functions, and no blocks.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from memserve.core.block_keys import BlockKey
from memserve.core.cache_events import CacheEvent, Snapshot, Stored
from memserve.core.errors import MemServeError
from memserve.core.executor import BoundedExecutor
from memserve.core.ids import Epoch
from memserve.wire.link import ControlClient
from memserve.wire.messages import (
    AuditWanted,
    Done,
    Message,
    PoolEvents,
    PromptKeys,
    Refused,
    SnapshotPart,
    Unknown,
)

logger = logging.getLogger(__name__)

ANSWER_TIMEOUTS_S = (0.25, 0.25, 0.25, 0.5, 1.0, 2.0)
"""Short at first, so that three lost messages in a row cost less than a second; then longer, to spare a
router that is only busy. The last one repeats."""


@dataclass(frozen=True, slots=True)
class ReportConfig:
    """How a pool reports its changes."""

    period_s: float = 0.02
    """Period of reports: events of one period are sent together."""
    idle_s: float = 1.0
    """A report is sent after this time even without events: it detects a router that lost its state."""
    unknown_s: float = 0.1
    """Period of attempts at a router that does not know this pool, which registers on another thread."""
    pause: float = 0.2
    """Wait between two attempts, as a share of the time limit of an answer."""
    max_keys: int = 1 << 16
    """In one message: 2 MiB."""
    max_audit_keys: int = 1 << 14
    """In one message of an audit: bounds the time for which a comparison blocks the router. Events wait until
    the audit is over, about 0.7 s for a million blocks."""


class PromptKeyLog:
    """The keys of prompts that have arrived, for a router that knows prompts by their text only.

    Keys are computed on a thread, so that the scheduler only hands over token ids. Any thread may call.
    """

    def __init__(self, *, max_prompts: int = 256, max_prompt_keys: int = 1 << 14) -> None:
        """`max_prompts`: prompts whose keys wait to be sent.

        `max_prompt_keys`: keys of one prompt that are sent; the router does not learn those after them.
        """
        self._max_prompt_keys = max_prompt_keys
        self._executor = BoundedExecutor("mempool-keys", capacity=max_prompts)
        self._prompts: deque[PromptKeys] = deque(maxlen=max_prompts)
        self._lock = threading.Lock()

    def add(self, rid: str, keys: Callable[[], Sequence[BlockKey]]) -> None:
        """A prompt has arrived; `keys` computes those of its whole pages, on the thread."""
        self._executor.execute(lambda: self._add(rid, keys))

    def take(self) -> tuple[PromptKeys, ...]:
        """The prompts since the last call, at most the latest `max_prompts`."""
        with self._lock:
            prompts = tuple(self._prompts)
            self._prompts.clear()
        return prompts

    def close(self) -> None:
        """Stop the thread. Idempotent."""
        self._executor.close()

    def _add(self, rid: str, keys: Callable[[], Sequence[BlockKey]]) -> None:
        prompt = PromptKeys(rid, tuple(keys()[: self._max_prompt_keys]))
        with self._lock:
            self._prompts.append(prompt)


class Publisher:
    """Sends on a thread of its own, from construction to `close`."""

    def __init__(
        self, client: ControlClient, source: ReportSource, config: ReportConfig | None = None
    ) -> None:
        """Takes `client` and closes it in the end."""
        self._client = client
        self._closing = threading.Event()
        self._session = SyncSession(client, source, self._closing.wait, config)
        self._thread = threading.Thread(target=self._run, name="mempool-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop. Takes at most a few seconds; idempotent."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._session.run()
            self._client.close()
        except Exception:
            logger.exception("the publisher of the memory pool failed; this process cannot go on")
            os._exit(1)


@dataclass(frozen=True, slots=True)
class ReportSource:
    """The reported side of a pool."""

    epoch: Epoch
    take_events: Callable[[], list[CacheEvent]]
    snapshot: Callable[[], Snapshot]
    layout: str = ""
    """As in `PoolEvents`."""
    take_prompt_keys: Callable[[], tuple[PromptKeys, ...]] = tuple
    """As `prompts` of `PoolEvents`."""

    def news(self, events: Iterable[CacheEvent], prompts: tuple[PromptKeys, ...] = ()) -> PoolEvents:
        return PoolEvents(self.epoch, tuple(events), self.layout, prompts)


class SyncSession:
    """The messages of a publisher, in order. One thread: the one that calls `run`."""

    def __init__(
        self,
        client: ControlClient,
        source: ReportSource,
        wait: Callable[[float], bool],
        config: ReportConfig | None = None,
    ) -> None:
        """`wait` waits for so many seconds and returns True when it is time to stop."""
        self._client = client
        self._source = source
        self._take_events = source.take_events
        self._snapshot = source.snapshot
        self._wait = wait
        self._config = config or ReportConfig()
        self._unsent: list[CacheEvent] = []
        """Events that were taken but not sent yet: they are later than an audit."""
        self._quiet_s = 0.0

    def run(self) -> None:
        """Return when it is time to stop."""
        in_sync = False
        while not self._wait(self._config.period_s if in_sync else self._config.unknown_s):
            in_sync = self._send_events() if in_sync else self._send_snapshot()

    def _send_events(self) -> bool:
        """Send the new events; returns whether the router has all of them."""
        events, prompts = [*self._unsent, *self._take_events()], self._source.take_prompt_keys()
        self._unsent = []
        self._quiet_s += self._config.period_s
        if not events and not prompts and self._quiet_s < self._config.idle_s:
            return True
        self._quiet_s = 0.0
        if _num_keys(events) > self._config.max_keys:
            return self._send_snapshot()
        answer = self._ask(self._source.news(events, prompts))
        return self._audit() if isinstance(answer, AuditWanted) else isinstance(answer, Done)

    def _send_snapshot(self) -> bool:
        """Send a snapshot if the router knows this pool; returns whether the router has it."""
        if isinstance(self._ask(self._source.news(())), Unknown | None):
            return False
        self._unsent = []
        self._take_events()  # The snapshot contains them.
        return self._send(parts(self._source, self._snapshot(), self._config.max_keys))

    def _audit(self) -> bool:
        """Send a snapshot to a router that has all events, which compares it with its tree.

        Events after the snapshot are sent after it: otherwise the two would not be of one moment.
        """
        snapshot = self._snapshot()
        events = self._take_events()
        self._unsent = [event for event in events if event.sequence > snapshot.sequence]
        before = events[: len(events) - len(self._unsent)]
        if _num_keys(before) > self._config.max_keys:
            return self._send_snapshot()
        audit = parts(self._source, snapshot, self._config.max_audit_keys, is_audit=True)
        return self._send(chain([self._source.news(before)], audit))

    def _send(self, messages: Iterable[Message]) -> bool:
        """Send the messages; returns whether the router has accepted all of them."""
        return all(isinstance(self._ask(message), Done | AuditWanted) for message in messages)

    def _ask(self, message: Message) -> Message | None:
        """The answer, after as many attempts as it takes; None if it is time to stop."""
        for timeout_s in chain(ANSWER_TIMEOUTS_S, repeat(ANSWER_TIMEOUTS_S[-1])):
            try:
                answer = self._client.request(message, timeout_s=timeout_s)
                if not isinstance(answer, Refused):
                    return answer
                logger.debug("refused: %s", answer.reason)
            except MemServeError as error:
                logger.debug("not answered: %s", error)
            if self._wait(self._config.pause * timeout_s):
                break
        return None


def parts(
    source: ReportSource, snapshot: Snapshot, max_keys: int, *, is_audit: bool = False
) -> Iterator[SnapshotPart]:
    """The messages of a snapshot: at least one. Pure."""
    index, room = 0, max_keys
    chains: list[Stored] = []

    def part(is_last: bool) -> SnapshotPart:
        whole = tuple(chains)
        return SnapshotPart(source.epoch, snapshot.sequence, index, is_last, whole, is_audit, source.layout)

    for one in snapshot.chains:
        parent, keys = one.parent, one.keys
        while keys:
            chains.append(Stored(0, one.tier, parent, keys[:room]))
            parent, keys, room = keys[min(room, len(keys)) - 1], keys[room:], room - len(chains[-1].keys)
            if not room:
                yield part(is_last=False)
                index, room, chains = index + 1, max_keys, []
    yield part(is_last=True)


def _num_keys(events: Iterable[CacheEvent]) -> int:
    return sum(len(event.keys) for event in events)
