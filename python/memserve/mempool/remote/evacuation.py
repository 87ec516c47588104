"""Saves a pool's blocks before its instance stops: sends other pools the blocks that no pool has.

    for each prompt, the last used first:   Locate at every target ── one has all of it: done
                                            else push the missing blocks to the target that lacks least

The recency of blocks of two pools does not compare, so each of k targets is taken to be as busy as this
pool: of all blocks of a target and this pool, the coldest 1 / (k + 1) goes, and no target evicts more
than that share. Sent chains are touched once more at the end, the most recent last, so that they are not
the first to be evicted there. Knows no transports: locating and sending are calls it was given.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from xxhash import xxh3_64_intdigest

from memserve.core.block_keys import BlockKey
from memserve.core.errors import MemServeError, PeerDeclined
from memserve.core.executor import BoundedExecutor
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.records import Pushed
from memserve.peering.remote_process import PeerAddress
from memserve.wire.messages import Message
from memserve.wire.peer_messages import Evacuate, Evacuated, EvacuationTarget, Located

logger = logging.getLogger(__name__)

LATE, NO_PEER, NO_ROOM = "the time was over", "no pool takes such blocks", "the others have no room"


class EvacuationPeers(Protocol):
    """The part of `Peers` in use here."""

    def room(self, peer: PeerAddress, pool: MemPool, keys: Sequence[BlockKey]) -> Located: ...

    def transfer_with_insert(
        self,
        instance: PeerAddress,
        pool: MemPool,
        keys: Sequence[BlockKey],
        *,
        parent: BlockKey | None = None,
    ) -> Pushed: ...


@dataclass(slots=True, eq=False)
class _EvacuationTarget:
    """A target pool, and how many blocks it may still take."""

    name: str
    address: PeerAddress
    room: int = 0


@dataclass(frozen=True, slots=True)
class _Choice:
    """Where the rest of a chain goes, and how much of it is there."""

    target: _EvacuationTarget
    start: int
    """Index in the chain: the blocks before it are there, as far as this pool knows."""
    num_lacking: int


class EvacuationRun:
    """One evacuation of one pool. One thread."""

    def __init__(
        self,
        peers: EvacuationPeers,
        pool: MemPool,
        targets: Sequence[EvacuationTarget],
        now: Callable[[], float],
        piece_blocks: int = 256,
    ) -> None:
        """`piece_blocks`: blocks sent between two checks of the deadline."""
        self._peers = peers
        self._piece_blocks = piece_blocks
        self._pool = pool
        self._now = now
        self._targets = [_EvacuationTarget(one.name, PeerAddress(one.address, one.epoch)) for one in targets]
        self._locations: dict[BlockKey, _EvacuationTarget] = {}
        """The target of each block that is elsewhere. Prefix-closed."""
        self._sent = Pushed()
        self._sent_ends: list[tuple[_EvacuationTarget, BlockKey, BlockKey | None]] = []
        """Of the sent prompts, in order: the target, the last block, and the block before it."""

    def run(self, timeout_s: float) -> Evacuated:
        """Send for at most `timeout_s`. A fault of a target costs the blocks it was to get, no more."""
        deadline = self._now() + timeout_s
        self._measure_room()
        num_saved = -1
        while num_saved < len(self._locations):  # Requests that end meanwhile leave more behind.
            num_saved = len(self._locations)
            for key in self._pool.recent_leaves():
                if not self._targets or self._now() >= deadline:
                    break
                if not self._save(self._pool.chain_to(key), deadline):
                    break
        self._touch_lru(deadline)
        num_left = max(0, self._pool.stats().cached - len(self._locations))
        num_known = len(self._locations) - self._sent.num_sent
        reason = self._reason_left(deadline) if num_left else ""
        return Evacuated(self._sent.num_sent, self._sent.num_bytes, num_known, num_left, reason)

    def _reason_left(self, deadline: float) -> str:
        if not self._targets:
            return NO_PEER
        if self._now() >= deadline:
            return LATE
        return "not all were taken" if any(target.room > 0 for target in self._targets) else NO_ROOM

    def _measure_room(self) -> None:
        """Ask all targets for their room; a target that does not answer is dropped."""
        num_pools = len(self._targets) + 1
        for target in list(self._targets):
            located = self._located(target, ())
            if located is not None:
                target.room = located.num_free + located.num_evictable // num_pools

    def _save(self, chain: Sequence[BlockKey], deadline: float) -> bool:
        """Get the whole chain elsewhere, as far as possible; False if no target has room for any of it."""
        num_saved = bisect_left(chain, True, key=lambda key: key not in self._locations)
        if num_saved == len(chain):
            return True
        choices = self._choices(chain, num_saved)
        if choices and not choices[0].num_lacking:
            self._note_location(chain, len(chain), choices[0].target)
            return True
        fitting = [one for one in choices if one.target.room >= one.num_lacking]
        choice = next(iter(fitting), max(choices, key=lambda one: one.target.room, default=None))
        if choice is None:
            return True
        if choice.target.room < 1:
            return False
        self._push(chain, choice, deadline)
        return True

    def _choices(self, chain: Sequence[BlockKey], num_saved: int) -> list[_Choice]:
        """All targets, those that lack least first; equal ones in the prompt's own order."""
        location = self._locations[chain[num_saved - 1]] if num_saved else None
        choices = []
        for target in list(self._targets):
            located = self._located(target, chain[num_saved:])
            if located is None:
                continue
            # A target that has the block after the saved ones has the saved ones as well.
            start = num_saved + located.num_blocks if located.num_blocks or target is location else 0
            choices.append(_Choice(target, start, len(chain) - start))
        root = chain[0]
        return sorted(choices, key=lambda one: (one.num_lacking, preference(root, one.target.name)))

    def _push(self, chain: Sequence[BlockKey], choice: _Choice, deadline: float) -> None:
        target, at = choice.target, choice.start
        self._note_location(chain, at, target)
        while at < len(chain) and target.room > 0 and self._now() < deadline:
            piece = chain[at : at + min(self._piece_blocks, target.room)]
            pushed = self._pushed(target, piece, chain[at - 1] if at else None)
            if pushed is None:
                return
            self._sent += pushed
            target.room -= pushed.num_sent
            taken = pushed.num_known + pushed.num_sent
            at += taken
            self._note_location(chain, at, target)
            if taken < len(piece):
                return
        if at:
            self._sent_ends.append((target, chain[at - 1], chain[at - 2] if at > 1 else None))

    def _touch_lru(self, deadline: float) -> None:
        """Offer the last blocks of what was sent: each offer counts as a use there."""
        while self._sent_ends and self._now() < deadline:
            target, key, parent = self._sent_ends.pop()
            if target in self._targets:
                self._pushed(target, [key], parent)

    def _pushed(
        self, target: _EvacuationTarget, keys: Sequence[BlockKey], parent: BlockKey | None
    ) -> Pushed | None:
        try:
            return self._peers.transfer_with_insert(target.address, self._pool, keys, parent=parent)
        except PeerDeclined as error:
            if not error.parent_unknown:
                target.room = 0
        except MemServeError as error:
            self._drop_target(target, error)
        return None

    def _located(self, target: _EvacuationTarget, keys: Sequence[BlockKey]) -> Located | None:
        try:
            return self._peers.room(target.address, self._pool, keys)
        except MemServeError as error:
            self._drop_target(target, error)
            return None

    def _drop_target(self, target: _EvacuationTarget, error: MemServeError) -> None:
        logger.warning("evacuation goes on without peer=%s: %s", target.name, error)
        self._targets.remove(target)

    def _note_location(self, chain: Sequence[BlockKey], num_blocks: int, target: _EvacuationTarget) -> None:
        for key in chain[:num_blocks]:
            self._locations.setdefault(key, target)


class Evacuations:
    """The evacuations that a router requests: one at a time, each answered at its end. Any thread may ask."""

    def __init__(
        self, peers: EvacuationPeers, now: Callable[[], float], *, max_evacuations: int, niceness: int
    ) -> None:
        """`max_evacuations`: running or waiting; `niceness`: of the sending thread."""
        self._peers = peers
        self._max_evacuations = max_evacuations
        self._closing = threading.Event()
        self._now = lambda: float("inf") if self._closing.is_set() else now()
        self._executor = BoundedExecutor("peer-evacuation", capacity=max_evacuations, niceness=niceness)

    def answer(self, message: Evacuate, pool: MemPool | None) -> Message | Future[Message]:
        """The outcome for the blocks. Returns at once."""
        if pool is None:
            return Evacuated(0, 0, 0, 0, "there is no pool of such blocks here")
        run = EvacuationRun(self._peers, pool, message.targets, self._now)
        future: Future[Message] | None = self._executor.submit(lambda: run.run(message.timeout_s))
        if future is None:
            reason = f"{self._max_evacuations} evacuations are running or waiting"
            return Evacuated(0, 0, 0, pool.stats().cached, reason)
        return future

    def close(self) -> None:
        """End the running evacuation at its next check of the deadline, drop the others."""
        self._closing.set()
        self._executor.close()


def preference(root: BlockKey, name: str) -> int:
    """Rendezvous hashing of a prompt's first block and a pool's name: the lowest value is preferred.

    Blocks of all ranks, and prompts with a common start, meet at one pool, which stays the same when
    other pools join or leave.
    """
    return xxh3_64_intdigest(root + name.encode())
