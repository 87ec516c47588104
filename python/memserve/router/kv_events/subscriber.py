"""Follows one cache of a stock SGLang server into the cluster's tree, by the events it publishes.

    connected ──replay from 0──> learning <──> gap: replay the missing ones
        ^                           │
        └── lost ── forget ─────────┴── what cannot be followed: forget, go on from the next message

SGLang numbers its messages and has no snapshots: who comes late, or misses what nobody repeats, knows
less than the worker has until it is stored anew, or a prompt that came by is continued; never more.
Knows sockets by `ZmqEventStream` alone. Event loop thread only.
Source: SGLang 0.5.23, disaggregation/kv_events.py, mem_cache/events.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import msgspec
import zmq

from memserve.core.block_addr import Tier
from memserve.core.cache_events import CacheEvent, Snapshot
from memserve.core.ids import InstanceId, new_epoch
from memserve.router.kv_events.zmq_stream import MalformedFrames, StreamLost, ZmqEventStream
from memserve.router.server_info import EventSource
from memserve.scheduling.prompt_tree.event_hashes import EventHashKeys
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree

logger = logging.getLogger(__name__)

PIECE_BLOCKS = 256
"""As many blocks of a message are taken in before the event loop has its turn: about a millisecond."""

_TIERS = {None: Tier.HBM, "GPU": Tier.HBM, "CPU_PINNED": Tier.DRAM}
_NO_TOKENS = msgspec.Raw(b"\x90")


class _BlockStored(msgspec.Struct, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: msgspec.Raw = _NO_TOKENS
    """Of pairs, with some ways of speculating: these are in no key of ours."""
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
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)


@dataclass(slots=True)
class SourceStats:
    """How the following of one cache goes."""

    connected: bool = False
    complete: bool = False
    """All that the worker has told since it began, or emptied its cache, has been heard."""
    displaced: bool = False
    """Another reports under its name: it is followed no more."""
    batches: int = 0
    replayed: int = 0
    """Batches, of those, that were asked for again."""
    stored: int = 0
    """Blocks that the tree was told of."""
    removed: int = 0
    cleared: int = 0
    unverified: int = 0
    """Blocks that were left out, as their names could not be told to be those of any key."""
    forgotten: Counter[str] = field(default_factory=Counter)
    """How often all that was believed was dropped, by reason: gap, restart, malformed, lost, failed."""


@dataclass(frozen=True, slots=True)
class SubscriberTimeouts:
    """How long to wait for what."""

    connect_s: float = 10.0
    """Before it is logged that there is no connection; it is waited for all the same."""
    replay_s: float = 3.0
    """For the next message of a replay. Its sender looks for requests ten times a second."""
    retry_s: float = 1.0
    """Before another connection, after one that was lost."""


class _Superseded(Exception):
    """The tree does not take this follower's word any more."""


class KvEventSubscriber:
    """Follows one cache from when it is made until it is stopped. Never raises for what a worker sends."""

    def __init__(
        self,
        instance: InstanceId,
        source: EventSource,
        tree: Callable[[], GlobalPromptTree],
        short: EventHashKeys,
        context: zmq.Context[zmq.Socket[bytes]],
        patience: SubscriberTimeouts,
    ) -> None:
        """Joins the tree as `instance`, at once. Needs a running loop."""
        self.instance = instance
        self._source = source
        self._tree = tree
        self._short = short
        self._context = context
        self._patience = patience
        self._stats = SourceStats()
        self._next: int | None = None
        """The number of the message that comes next; None: whichever comes."""
        self._live = -1
        """The number of the last message that came by itself."""
        self._sequence = 0
        """Of the tree's last event, and of the last when nothing was held: numbers of our own."""
        self._cleared = 0
        self._warned_s = float("-inf")
        self._join()
        self._task = asyncio.create_task(self._run(), name=f"follow-{instance}")

    @property
    def is_displaced(self) -> bool:
        """Whether another reports in its place."""
        return self._stats.displaced

    @property
    def stats(self) -> SourceStats:
        """A copy."""
        return replace(self._stats, forgotten=Counter(self._stats.forgotten))

    def stop(self) -> asyncio.Task[None]:
        """Change the tree no more, from now on; what is returned ends when the sockets are closed."""
        self._task.cancel()
        return self._task

    async def _run(self) -> None:
        while not self._stats.displaced:
            try:
                with ZmqEventStream(self._context, self._source) as line:
                    if not await line.connected(self._patience.connect_s):
                        logger.warning(
                            "cannot connect to the events of instance=%s %s", self.instance, self._source
                        )
                        await line.connected(None)
                    self._stats.connected = True
                    self._next, self._live = None, -1
                    await self._follow(line)
            except _Superseded:
                self._stats.displaced = True
            except StreamLost as error:
                self._forget("lost", str(error), joins=True)
            except Exception as error:
                self._forget("failed", repr(error), joins=True)
            self._stats.connected = False
            await asyncio.sleep(self._patience.retry_s)
        logger.warning("another reports in its place, its events are not followed instance=%s", self.instance)

    async def _follow(self, line: ZmqEventStream) -> None:
        """Learn until the line is lost."""
        await self._fill(line, 0)
        while True:
            try:
                sequence, payload = await line.next()
            except MalformedFrames:
                self._forget("malformed", "a message is not of three frames")
                self._next = None
                continue
            if self._next is not None and sequence > self._next:
                await self._fill(line, self._next)
            is_new = sequence > self._live
            self._live = sequence
            if self._next is not None and sequence < self._next:
                if is_new:  # it was in a replay
                    continue
                self._forget("restart", f"message {sequence} instead of {self._next}", joins=True)
                self._next = None
            elif self._next is not None and sequence > self._next:
                self._forget("gap", f"message {sequence} instead of {self._next}")
                self._next = None
            await self._take(sequence, payload)

    async def _fill(self, line: ZmqEventStream, first: int) -> None:
        """Take in what the publisher repeats from `first` on, as far as it follows on what is known.

        Asks again for as long as that helps: of a long replay not all may arrive.
        """
        while True:
            before = self._next
            complete = False
            async with aclosing(line.replay(first, self._patience.replay_s)) as replay:
                complete = await self._replayed(replay)
            if complete and self._next is None:
                self._next = 0  # it has not published anything yet
            if complete or self._next is None or self._next == before:
                return
            first = self._next

    async def _replayed(self, replay: AsyncIterator[tuple[int, bytes] | None]) -> bool:
        """Whether all of it came."""
        try:
            async for message in replay:
                if message is None:
                    return True
                sequence, payload = message
                if self._next is not None and sequence > self._next:
                    return False
                if self._next is None or sequence == self._next:
                    self._stats.replayed += 1
                    await self._take(sequence, payload)
        except MalformedFrames:
            return False
        return False

    async def _take(self, sequence: int, payload: bytes) -> None:
        """Believe one message, which follows on what is known or begins it."""
        if self._next is None:
            self._stats.complete = sequence == 0
        self._next = sequence + 1
        self._stats.batches += 1
        try:
            batch = _decoder.decode(payload)
        except _UNREADABLE as error:
            self._forget("malformed", str(error))
            return
        for event in batch.events:
            if isinstance(event, _AllBlocksCleared):
                self._clear()
                self._stats.cleared += 1
                self._stats.complete = True
            elif event.medium in _TIERS:
                for piece in _pieces(event, _TIERS[event.medium]):
                    self._apply(piece)
                    await asyncio.sleep(0)
        await asyncio.sleep(0)

    def _apply(self, piece: _Piece) -> None:
        """Tell the tree. Raises _Superseded if it does not listen."""
        sequence = self._sequence + 1
        event: CacheEvent
        if piece.is_stored:
            event = self._short.stored(
                sequence, piece.tier, piece.parent, piece.names, piece.token_ids, piece.cache_salt
            )
            self._stats.stored += len(event.keys)
            self._stats.unverified += len(piece.names) - len(event.keys)
        else:
            event = self._short.removed(sequence, piece.tier, piece.names)
            self._stats.removed += len(event.keys)
        if event.keys:
            self._sequence = sequence
            if not self._tree().apply(self.instance, self._epoch, [event]):
                raise _Superseded

    def _forget(self, reason: str, detail: str, *, joins: bool = False) -> None:
        """Believe nothing of the cache. `joins`: it may be another process's, to which nothing was sent."""
        self._stats.forgotten[reason] += 1
        self._stats.complete = False
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._warned_s + 10.0:
            self._warned_s = now_s
            is_ours = reason == "failed"
            logger.warning(
                "cache learnt anew instance=%s reason=%s %a",
                self.instance, reason, detail[:200],
                exc_info=is_ours,
            )  # fmt: skip
        if not joins:
            self._clear()
        elif self._tree().apply(self.instance, self._epoch, ()):
            self._join()
        else:
            self._stats.displaced = True

    def _clear(self) -> None:
        """It holds nothing, and what was sent there is still expected."""
        if self._sequence > self._cleared:
            self._cleared = self._sequence
            self._tree().reset(self.instance, self._epoch, Snapshot(self._sequence, ()))

    def _join(self) -> None:
        self._epoch = new_epoch()
        self._sequence = self._cleared = 0
        self._tree().join(self.instance, self._epoch)


class _Piece(NamedTuple):
    """Of an event, as many blocks as are taken in at once."""

    is_stored: bool
    tier: Tier
    parent: int | None
    names: Sequence[int]
    token_ids: Sequence[int]
    cache_salt: str | None


def _pieces(event: _BlockStored | _BlockRemoved, tier: Tier) -> Iterator[_Piece]:
    names = event.block_hashes
    if isinstance(event, _BlockRemoved):
        for start in range(0, len(names), PIECE_BLOCKS):
            yield _Piece(False, tier, None, names[start : start + PIECE_BLOCKS], (), None)
        return
    tokens, parent = _tokens(event.token_ids), event.parent_block_hash
    page_tokens, rest = divmod(len(tokens), max(1, len(names)))
    for start in range(0, len(names), PIECE_BLOCKS):
        end = start + PIECE_BLOCKS
        mine = () if rest else tokens[start * page_tokens : end * page_tokens]
        yield _Piece(True, tier, parent, names[start:end], mine, event.cache_salt)
        parent = names[min(end, len(names)) - 1]


def _tokens(raw: msgspec.Raw) -> Sequence[int]:
    """None if they are not plain numbers."""
    try:
        return _token_decoder.decode(raw)
    except _UNREADABLE:
        return ()
