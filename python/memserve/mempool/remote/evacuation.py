"""What a pool holds goes to others before it does: hottest first, what nobody has, for so long and no longer.

    for each prompt, the last used first:   Locate at every shelter ── it is there: done
                                            else push what is lacking to the one that lacks least

How hot two pools' blocks are does not compare, so each of k shelters is taken to be as busy as this pool: of
what they and it hold, the coldest 1 / (k + 1) goes, and no shelter evicts more than that share for it.
What was sent is used there once more, the hottest last, so that it is not the first to be evicted.
Knows no transports: locating and pushing are calls it was given.
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

PIECE_BLOCKS = 256
"""Sent between two looks at the clock."""
NICENESS = 10
"""Of the sending thread: requests that have begun come first."""
MAX_WAITING = 4
"""Evacuations, the running one included."""
LATE, NO_PEER, NO_ROOM = "the time was over", "no pool takes such blocks", "the others have no room"


class EvacuationPeers(Protocol):
    """What of `Peers` is needed."""

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
    """One of the others, and how much it may still take."""

    name: str
    address: PeerAddress
    room: int = 0


@dataclass(frozen=True, slots=True)
class _Choice:
    """Where the rest of a chain goes, and what of it is there."""

    shelter: _EvacuationTarget
    start: int
    """Of the chain: what comes before is there, as far as anybody knows."""
    num_lacking: int


class EvacuationRun:
    """One pool's way out. One thread."""

    def __init__(
        self,
        exchange: EvacuationPeers,
        pool: MemPool,
        shelters: Sequence[EvacuationTarget],
        now: Callable[[], float],
    ) -> None:
        self._exchange = exchange
        self._pool = pool
        self._now = now
        self._shelters = [
            _EvacuationTarget(one.name, PeerAddress(one.address, one.epoch)) for one in shelters
        ]
        self._homes: dict[BlockKey, _EvacuationTarget] = {}
        """Of each block that is elsewhere, where. Prefix-closed."""
        self._sent = Pushed()
        self._ends: list[tuple[_EvacuationTarget, BlockKey, BlockKey | None]] = []
        """Of the prompts that were sent, in order: where, the last block, and the one before it."""

    def run(self, timeout_s: float) -> Evacuated:
        """Send for so long. What a shelter does wrong costs the blocks it was to get, never more."""
        deadline = self._now() + timeout_s
        self._measure()
        num_saved = -1
        while num_saved < len(self._homes):  # Requests that end meanwhile leave more behind.
            num_saved = len(self._homes)
            for key in self._pool.recent_leaves():
                if not self._shelters or self._now() >= deadline:
                    break
                if not self._save(self._pool.chain_to(key), deadline):
                    break
        self._use_again(deadline)
        num_left = max(0, self._pool.stats().cached - len(self._homes))
        num_known = len(self._homes) - self._sent.num_sent
        reason = self._why_left(deadline) if num_left else ""
        return Evacuated(self._sent.num_sent, self._sent.num_bytes, num_known, num_left, reason)

    def _why_left(self, deadline: float) -> str:
        if not self._shelters:
            return NO_PEER
        if self._now() >= deadline:
            return LATE
        return "not all were taken" if any(shelter.room > 0 for shelter in self._shelters) else NO_ROOM

    def _measure(self) -> None:
        """Ask all how much room they have; who does not answer is none."""
        num_pools = len(self._shelters) + 1
        for shelter in list(self._shelters):
            located = self._located(shelter, ())
            if located is not None:
                shelter.room = located.num_free + located.num_evictable // num_pools

    def _save(self, chain: Sequence[BlockKey], deadline: float) -> bool:
        """Have the whole chain elsewhere, as far as can be; False if nobody has room for any of it."""
        num_saved = bisect_left(chain, True, key=lambda key: key not in self._homes)
        if num_saved == len(chain):
            return True
        choices = self._choices(chain, num_saved)
        if choices and not choices[0].num_lacking:
            self._settle(chain, len(chain), choices[0].shelter)
            return True
        fitting = [one for one in choices if one.shelter.room >= one.num_lacking]
        choice = next(iter(fitting), max(choices, key=lambda one: one.shelter.room, default=None))
        if choice is None:
            return True
        if choice.shelter.room < 1:
            return False
        self._push(chain, choice, deadline)
        return True

    def _choices(self, chain: Sequence[BlockKey], num_saved: int) -> list[_Choice]:
        """All shelters, those that lack least first; of equals, each prompt has a favourite."""
        home = self._homes[chain[num_saved - 1]] if num_saved else None
        choices = []
        for shelter in list(self._shelters):
            located = self._located(shelter, chain[num_saved:])
            if located is None:
                continue
            # Who has the block after those that are saved has these, too.
            start = num_saved + located.num_blocks if located.num_blocks or shelter is home else 0
            choices.append(_Choice(shelter, start, len(chain) - start))
        root = chain[0]
        return sorted(choices, key=lambda one: (one.num_lacking, _preference(root, one.shelter.name)))

    def _push(self, chain: Sequence[BlockKey], choice: _Choice, deadline: float) -> None:
        shelter, at = choice.shelter, choice.start
        self._settle(chain, at, shelter)
        while at < len(chain) and shelter.room > 0 and self._now() < deadline:
            piece = chain[at : at + min(PIECE_BLOCKS, shelter.room)]
            pushed = self._pushed(shelter, piece, chain[at - 1] if at else None)
            if pushed is None:
                return
            self._sent += pushed
            shelter.room -= pushed.num_sent
            taken = pushed.num_known + pushed.num_sent
            at += taken
            self._settle(chain, at, shelter)
            if taken < len(piece):
                return
        if at:
            self._ends.append((shelter, chain[at - 1], chain[at - 2] if at > 1 else None))

    def _use_again(self, deadline: float) -> None:
        """Offer the ends of what was sent, which are known there by now: each is a use."""
        while self._ends and self._now() < deadline:
            shelter, key, parent = self._ends.pop()
            if shelter in self._shelters:
                self._pushed(shelter, [key], parent)

    def _pushed(
        self, shelter: _EvacuationTarget, keys: Sequence[BlockKey], parent: BlockKey | None
    ) -> Pushed | None:
        try:
            return self._exchange.transfer_with_insert(shelter.address, self._pool, keys, parent=parent)
        except PeerDeclined as error:
            if not error.parent_unknown:
                shelter.room = 0
        except MemServeError as error:
            self._lost(shelter, error)
        return None

    def _located(self, shelter: _EvacuationTarget, keys: Sequence[BlockKey]) -> Located | None:
        try:
            return self._exchange.room(shelter.address, self._pool, keys)
        except MemServeError as error:
            self._lost(shelter, error)
            return None

    def _lost(self, shelter: _EvacuationTarget, error: MemServeError) -> None:
        logger.warning("evacuation goes on without peer=%s: %s", shelter.name, error)
        self._shelters.remove(shelter)

    def _settle(self, chain: Sequence[BlockKey], num_blocks: int, shelter: _EvacuationTarget) -> None:
        for key in chain[:num_blocks]:
            self._homes.setdefault(key, shelter)


class Evacuations:
    """Those that a router asks for: one after the other, answered when over. Any thread may ask."""

    def __init__(self, exchange: EvacuationPeers, now: Callable[[], float]) -> None:
        self._exchange = exchange
        self._closing = threading.Event()
        self._now = lambda: float("inf") if self._closing.is_set() else now()
        self._executor = BoundedExecutor("peer-evacuation", capacity=MAX_WAITING, niceness=NICENESS)

    def answer(self, message: Evacuate, pool: MemPool | None) -> Message | Future[Message]:
        """What has become of the blocks. Returns at once."""
        if pool is None:
            return Evacuated(0, 0, 0, 0, "there is no pool of such blocks here")
        run = EvacuationRun(self._exchange, pool, message.shelters, self._now)
        future: Future[Message] | None = self._executor.submit(lambda: run.run(message.timeout_s))
        if future is None:
            reason = f"{MAX_WAITING} evacuations are running or waiting"
            return Evacuated(0, 0, 0, pool.stats().cached, reason)
        return future

    def close(self) -> None:
        """End the running evacuation at its next look at the clock, drop the others."""
        self._closing.set()
        self._executor.close()


def _preference(root: BlockKey, name: str) -> int:
    """Rendezvous hashing: the blocks of all ranks, and all that begins alike, come together."""
    return xxh3_64_intdigest(root + name.encode())
