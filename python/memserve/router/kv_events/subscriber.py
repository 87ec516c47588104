"""Keeps one cache of a stock SGLang server up to date in the global prompt tree, by the server's events.

    connected ──replay from 0──> applying <──> gap: replay the missing messages
        ^                           │
        └── lost ── forget ─────────┴── messages missing or malformed: forget, go on from the next message

SGLang numbers its messages and has no snapshots: a subscriber that connects late, or misses messages that
are not replayed, knows less than the worker holds until blocks are stored anew or continue a known
prompt. It never knows more. Knows sockets by `ZmqEventStream` alone. Event loop thread only.
Source: SGLang 0.5.23, disaggregation/kv_events.py, mem_cache/events.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import msgspec
import zmq.asyncio

from memserve.core.block_addr import Tier
from memserve.core.cache_events import CacheEvent, Snapshot
from memserve.core.ids import InstanceId, new_epoch
from memserve.router.kv_events.zmq_stream import MalformedFrames, StreamLost, ZmqEventStream
from memserve.router.server_info import EventSource
from memserve.scheduling.prompt_tree.event_hashes import EventHashKeys
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree

logger = logging.getLogger(__name__)

PIECE_BLOCKS = 256
"""Blocks applied per turn of the event loop: about a millisecond."""
WARNING_INTERVAL_S = 10.0
"""At most one warning about one cache in this time."""

_TIERS = {None: Tier.HBM, "GPU": Tier.HBM, "CPU_PINNED": Tier.DRAM}


class _BlockStored(msgspec.Struct, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: msgspec.Raw = msgspec.Raw(b"\x90")
    """Pairs of tokens with some ways of speculative decoding; no key of ours is computed from pairs."""
    medium: str | None = None
    cache_salt: str | None = None


class _BlockRemoved(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: list[int]
    medium: str | None = None


class _AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_BlockStored | _BlockRemoved | _AllBlocksCleared]


_decoder = msgspec.msgpack.Decoder(_Batch)
_token_decoder = msgspec.msgpack.Decoder(list[int])
_PARSE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)


@dataclass(slots=True)
class SourceStats:
    """The state of one subscription, and its counters since it began."""

    connected: bool = False
    complete: bool = False
    """Every event since the worker began, or emptied its cache, has been applied."""
    displaced: bool = False
    """Another source reports under this name in the tree: the subscription has ended."""
    batches: int = 0
    replayed: int = 0
    """Batches that came in a replay."""
    stored: int = 0
    """Blocks stored in the tree."""
    removed: int = 0
    cleared: int = 0
    unverified: int = 0
    """Blocks left out because no key is certain for their hashes."""
    forgotten: Counter[str] = field(default_factory=Counter)
    """How often all blocks of the cache were dropped, by reason: gap, restart, malformed, lost, failed."""


@dataclass(frozen=True, slots=True)
class SubscriberTimeouts:
    """The timeouts of a subscription."""

    connect_s: float = 10.0
    """After this a missing connection is logged; the subscriber waits on."""
    replay_s: float = 3.0
    """For the next message of a replay. SGLang looks for replay requests ten times a second."""
    retry_s: float = 1.0
    """Before the next connection after a lost one."""


class _Displaced(Exception):
    """The tree rejects the events: another source reports under this name."""


class KvEventSubscriber:
    """Subscribes from construction until `stop`. Never raises for what a worker sends."""

    def __init__(
        self,
        instance: InstanceId,
        source: EventSource,
        tree: Callable[[], GlobalPromptTree],
        event_keys: EventHashKeys,
        context: zmq.asyncio.Context,
        timeouts: SubscriberTimeouts,
    ) -> None:
        """Joins the tree as `instance` at once. Needs a running event loop."""
        self.instance = instance
        self._source = source
        self._tree = tree
        self._event_keys = event_keys
        self._context = context
        self._timeouts = timeouts
        self._stats = SourceStats()
        self._next: int | None = None
        """The number of the next message; None: any number."""
        self._live = -1
        """The number of the last message that was not replayed."""
        self._sequence = 0
        """The number of the tree's last event; these numbers are ours."""
        self._cleared = 0
        """The number of the tree's last event when the cache was empty."""
        self._warned_s = float("-inf")
        self._join()
        self._task = asyncio.create_task(self._run(), name=f"kv-events-{instance}")

    @property
    def is_displaced(self) -> bool:
        """Whether another source reports under this name."""
        return self._stats.displaced

    @property
    def stats(self) -> SourceStats:
        """A copy."""
        return replace(self._stats, forgotten=Counter(self._stats.forgotten))

    def stop(self) -> asyncio.Task[None]:
        """End all changes to the tree; the returned task ends when the sockets are closed."""
        self._task.cancel()
        return self._task

    async def _run(self) -> None:
        while not self._stats.displaced:
            try:
                with ZmqEventStream(self._context, self._source) as stream:
                    if not await stream.connected(self._timeouts.connect_s):
                        logger.warning(
                            "cannot connect to the events of instance=%s %s", self.instance, self._source
                        )
                        await stream.connected(None)
                    self._stats.connected = True
                    self._next, self._live = None, -1
                    await self._apply_messages(stream)
            except _Displaced:
                self._stats.displaced = True
            except StreamLost as error:
                self._forget("lost", str(error), joins=True)
            except Exception as error:
                self._forget("failed", repr(error), joins=True)
            self._stats.connected = False
            await asyncio.sleep(self._timeouts.retry_s)
        logger.warning("another source reports this cache, its events are ignored instance=%s", self.instance)

    async def _apply_messages(self, stream: ZmqEventStream) -> None:
        """Apply messages until the stream is lost."""
        await self._replay(stream, 0)
        while True:
            try:
                sequence, payload = await stream.next()
            except MalformedFrames:
                self._forget("malformed", "a message does not have three frames")
                self._next = None
                continue
            if self._next is not None and sequence > self._next:
                await self._replay(stream, self._next)
            is_new = sequence > self._live
            self._live = sequence
            if self._next is not None and sequence < self._next:
                if is_new:  # a replay contained it
                    continue
                self._forget("restart", f"message {sequence} instead of {self._next}", joins=True)
                self._next = None
            elif self._next is not None and sequence > self._next:
                self._forget("gap", f"message {sequence} instead of {self._next}")
                self._next = None
            await self._apply_message(sequence, payload)

    async def _replay(self, stream: ZmqEventStream, first: int) -> None:
        """Apply the messages that the publisher repeats from `first` on, up to the first gap.

        Asks again while that helps: parts of a long replay may be lost.
        """
        while True:
            before, complete = self._next, False
            async with aclosing(stream.replay(first, self._timeouts.replay_s)) as messages:
                try:
                    async for message in messages:
                        if message is None:
                            complete = True
                            break
                        if self._next is not None and message[0] > self._next:
                            break
                        if self._next is None or message[0] == self._next:
                            self._stats.replayed += 1
                            await self._apply_message(*message)
                except MalformedFrames:
                    pass
            if complete and self._next is None:
                self._next = 0  # the publisher has not published any message yet
            if complete or self._next is None or self._next == before:
                return
            first = self._next

    async def _apply_message(self, sequence: int, payload: bytes) -> None:
        """Apply one message, which is the next one or the first one."""
        if self._next is None:
            self._stats.complete = sequence == 0
        self._next = sequence + 1
        self._stats.batches += 1
        try:
            batch = _decoder.decode(payload)
        except _PARSE_ERRORS as error:
            self._forget("malformed", str(error))
            return
        for event in batch.events:
            if isinstance(event, _AllBlocksCleared):
                self._clear()
                self._stats.cleared += 1
                self._stats.complete = True
            elif event.medium in _TIERS:
                for change in self._changes(event, _TIERS[event.medium]):
                    self._apply(change)
                    await asyncio.sleep(0)
        await asyncio.sleep(0)

    def _changes(self, event: _BlockStored | _BlockRemoved, tier: Tier) -> Iterator[CacheEvent]:
        """The tree's events, of PIECE_BLOCKS each. Apply each before the next one is made."""
        if isinstance(event, _BlockRemoved):
            for start in range(0, len(event.block_hashes), PIECE_BLOCKS):
                piece = event.block_hashes[start : start + PIECE_BLOCKS]
                removed = self._event_keys.removed(self._sequence + 1, tier, piece)
                self._stats.removed += len(removed.keys)
                yield removed
            return
        hashes, parent, tokens = event.block_hashes, event.parent_block_hash, _tokens_of(event)
        page_tokens = len(tokens) // max(1, len(hashes))
        for start in range(0, len(hashes), PIECE_BLOCKS):
            piece = hashes[start : start + PIECE_BLOCKS]
            its_tokens = tokens[start * page_tokens : (start + len(piece)) * page_tokens]
            stored = self._event_keys.stored(
                self._sequence + 1, tier, parent, piece, its_tokens, event.cache_salt
            )
            self._stats.stored += len(stored.keys)
            self._stats.unverified += len(piece) - len(stored.keys)
            yield stored
            parent = piece[-1]

    def _apply(self, change: CacheEvent) -> None:
        """Change the tree. Raises _Displaced if it rejects the event."""
        if change.keys:
            self._sequence = change.sequence
            if not self._tree().apply(self.instance, self._epoch, [change]):
                raise _Displaced

    def _forget(self, reason: str, detail: str, *, joins: bool = False) -> None:
        """Drop all blocks of the cache. `joins`: the publisher may be another process, to which no prompt
        was sent yet, so drop the expected blocks, too."""
        self._stats.forgotten[reason] += 1
        self._stats.complete = False
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._warned_s + WARNING_INTERVAL_S:
            self._warned_s = now_s
            logger.warning(
                "cache learnt anew instance=%s reason=%s %a",
                self.instance, reason, detail[:200],
                exc_info=reason == "failed",
            )  # fmt: skip
        if not joins:
            self._clear()
        elif self._tree().apply(self.instance, self._epoch, ()):
            self._join()
        else:
            self._stats.displaced = True

    def _clear(self) -> None:
        """Drop the blocks that the cache holds; blocks of dispatched prompts are still expected."""
        if self._sequence > self._cleared:
            self._cleared = self._sequence
            self._tree().reset(self.instance, self._epoch, Snapshot(self._sequence, ()))

    def _join(self) -> None:
        self._epoch = new_epoch()
        self._sequence = self._cleared = 0
        self._tree().join(self.instance, self._epoch)


def _tokens_of(event: _BlockStored) -> Sequence[int]:
    """Empty if they are not plain numbers, in pages of equal size."""
    try:
        tokens = _token_decoder.decode(event.token_ids)
    except _PARSE_ERRORS:
        return ()
    return () if len(tokens) % max(1, len(event.block_hashes)) else tokens
