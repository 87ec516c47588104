"""Sends blocks to a peer: reserve there, write one-sidedly, commit; and cleans up after what fails.

    Reserve  →                              the peer pins what the blocks come after
             ←  Reserved(known, addrs)
    write ================================> the peer's arena
    Commit(checksums)  →                    sums, compares, indexes
             ←  Committed(new)
    a write that failed: settle, then Cancel(settled); if it cannot be settled: Cancel(not settled)
    a Cancel that is lost is sent again with the next exchange; the peer's deadline does without it

Knows no sockets; any thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memserve.core.block_addr import BlockAddr
from memserve.core.block_keys import BlockKey
from memserve.core.errors import InstanceLost, MemServeError, PeerDeclined, StaleEpoch, WireMismatch
from memserve.core.kv_layout import TransferMode
from memserve.mempool.remote.connection import PeerConnection, RemotePool, Result
from memserve.mempool.remote.read_leases import readable
from memserve.mempool.remote.records import Pushed
from memserve.wire.messages import Message
from memserve.wire.peer_messages import Allocate, Cancel, Commit, Committed, Declined, Reserve, Reserved

logger = logging.getLogger(__name__)

MAX_CHUNK_BYTES = 8 << 20
MAX_CHUNK_BLOCKS = 64
"""What one reservation or lease holds: longer chains go in several."""
MAX_LEFT_OVER = 64


def chunk_blocks(block_bytes: int) -> int:
    """Blocks per reservation or lease."""
    return max(1, min(MAX_CHUNK_BLOCKS, MAX_CHUNK_BYTES // block_bytes))


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of ours to send: their addresses, what they sum to, and how they are cut."""

    addrs: Sequence[BlockAddr]
    checksums: Sequence[int]
    mode: TransferMode = TransferMode.AGGREGATED

    def after(self, count: int) -> Blocks:
        """All but the first `count`."""
        return Blocks(self.addrs[count:], self.checksums[count:], self.mode)

    def part(self, start: int, stop: int) -> Blocks:
        return Blocks(self.addrs[start:stop], self.checksums[start:stop], self.mode)


@dataclass(frozen=True, slots=True)
class GrantedWrite:
    """A reservation at a peer, and the way it was reached when it was made."""

    reached: PeerConnection
    transfer_id: int
    num_known: int
    addrs: tuple[int, ...]


class Sender:
    """Writes to the pool of one peer. Any thread."""

    def __init__(self, remote: RemotePool, next_id: Callable[[], int]) -> None:
        """`next_id` never repeats itself in this process."""
        self.block_bytes = remote.pool.layout.block_bytes
        self._remote = remote
        self._next_id = next_id
        self._lock = threading.Lock()
        self._left_over: dict[int, tuple[PeerConnection | None, bool]] = {}

    def push(self, keys: Sequence[BlockKey], parent: BlockKey | None) -> Pushed:
        """See `Peers.push`."""
        pool = self._remote.pool
        step = chunk_blocks(self.block_bytes)
        with pool.acquire(readable(pool.match(keys))) as lease:
            done = Pushed()
            blocks = Blocks(lease.addrs, pool.checksums(lease))
            for start in range(0, len(lease), step):
                chunk = lease.keys[start : start + step]
                try:
                    part = self.insert(
                        chunk, blocks.part(start, start + step), lease.keys[start - 1] if start else parent
                    )
                except PeerDeclined as error:
                    if not start:
                        raise
                    logger.debug("chain cut short peer=%s after=%d: %s", self._remote.name, start, error)
                    break
                done += part
                taken = part.num_known + part.num_sent
                # Not taken: the peer got it elsewhere meanwhile, or it did not sum. Is that our memory?
                if taken < len(chunk) and pool.verify(lease) < start + len(chunk):
                    break
        return done

    def insert(self, keys: Sequence[BlockKey], blocks: Blocks, parent: BlockKey | None) -> Pushed:
        """Write what the peer lacks of a chain, as one reservation, and have it indexed."""

        def send(reached: PeerConnection) -> Pushed:
            digest = self._remote.pool.layout.digest
            transfer_id = self._next_id()
            reserve = Reserve(self._remote.epoch, transfer_id, digest, tuple(keys), parent)
            granted = self._granted(reached, reserve, transfer_id)
            missing = blocks.after(granted.num_known)
            if not granted.addrs:
                return Pushed(num_known=granted.num_known)
            self.write(granted, granted.addrs, missing)
            num_new = self._committed(granted, missing.checksums, (), None)
            num_bytes = len(missing.addrs) * self.block_bytes
            return Pushed(granted.num_known, num_new, num_bytes)

        return self._exchange(send)

    def allocate(self, num_blocks: int) -> GrantedWrite:
        """Reserve blocks that nobody indexes yet."""

        def ask(reached: PeerConnection) -> GrantedWrite:
            transfer_id = self._next_id()
            digest = self._remote.pool.layout.digest
            allocate = Allocate(self._remote.epoch, transfer_id, digest, num_blocks)
            return self._granted(reached, allocate, transfer_id)

        return self._exchange(ask)

    def write(self, granted: GrantedWrite, addrs: Sequence[int], blocks: Blocks) -> None:
        """Copy blocks over reserved ones. If it raises, the reservation has been or will be cancelled."""
        reached = granted.reached
        try:
            for extents in self._remote.pool.layout.copy_plan(blocks.mode):
                copies = self._remote.copies(reached, blocks.addrs, addrs, extents)
                reached.transport.write(reached.peer, copies, timeout_s=self._remote.timeout_s)
        except MemServeError as error:
            logger.warning("blocks not written peer=%s: %s", self._remote.name, error)
            self._give_up(granted.transfer_id, reached)
            raise

    def commit(
        self,
        granted: GrantedWrite,
        checksums: Sequence[int],
        keys: Sequence[BlockKey],
        parent: BlockKey | None,
    ) -> int:
        """End a reservation; returns how many blocks have been indexed. Keys are for allocated blocks."""
        return self._exchange(lambda _: self._committed(granted, checksums, keys, parent))

    def cancel(self, granted: GrantedWrite) -> None:
        """End a reservation that will not be committed. Never raises for the peer's failure."""
        self._give_up(granted.transfer_id, granted.reached)

    def _exchange(self, action: Callable[[PeerConnection], Result]) -> Result:
        self._clear_left_over()
        return self._remote.exchange(action)

    def _granted(
        self, reached: PeerConnection, message: Reserve | Allocate, transfer_id: int
    ) -> GrantedWrite:
        try:
            answer = self._remote.ask(message)
        except InstanceLost:
            self._leave_over(transfer_id, None, True)
            raise
        wanted = len(message.keys) if isinstance(message, Reserve) else message.num_blocks
        if isinstance(answer, Declined):
            raise PeerDeclined(self._remote.name, answer.reason, parent_unknown=answer.parent_unknown)
        if not isinstance(answer, Reserved) or answer.num_known + len(answer.addrs) != wanted:
            raise _nonsense(self._remote.name, answer)
        return GrantedWrite(reached, transfer_id, answer.num_known, answer.addrs)

    def _committed(
        self,
        granted: GrantedWrite,
        checksums: Sequence[int],
        keys: Sequence[BlockKey],
        parent: BlockKey | None,
    ) -> int:
        commit = Commit(self._remote.epoch, granted.transfer_id, tuple(checksums), tuple(keys), parent)
        try:
            answer = self._remote.ask(commit)
        except InstanceLost:
            self._leave_over(granted.transfer_id, None, True)
            raise
        if isinstance(answer, Declined):
            raise PeerDeclined(self._remote.name, answer.reason)
        if not isinstance(answer, Committed):
            raise _nonsense(self._remote.name, answer)
        return answer.num_new

    def _give_up(self, transfer_id: int, reached: PeerConnection) -> None:
        """Make sure that nothing lands late, if that can be had, and tell the peer."""
        settled = True
        try:
            reached.transport.settle(reached.peer, timeout_s=self._remote.timeout_s)
        except (InstanceLost, StaleEpoch):
            self._leave_over(transfer_id, None, True)  # Most likely nobody is there to tell.
            return
        except MemServeError as error:
            logger.warning("bytes may still land peer=%s: %s", self._remote.name, error)
            settled = False
        try:
            self._remote.ask(Cancel(self._remote.epoch, transfer_id, settled), attempts=1)
        except MemServeError:
            self._leave_over(transfer_id, None if settled else reached, settled)
            return
        if not settled:
            self._leave_over(transfer_id, reached, settled)

    def _leave_over(self, transfer_id: int, reached: PeerConnection | None, settled: bool) -> None:
        """Something to try once more when the peer answers again. What does not fit is dropped."""
        with self._lock:
            if len(self._left_over) < MAX_LEFT_OVER:
                self._left_over[transfer_id] = (reached, settled)

    def _clear_left_over(self) -> None:
        with self._lock:
            left_over, self._left_over = self._left_over, {}
        for transfer_id, (reached, settled) in left_over.items():
            try:
                if reached is not None and not settled:
                    reached.transport.settle(reached.peer, timeout_s=self._remote.timeout_s)
                self._remote.ask(Cancel(self._remote.epoch, transfer_id, True), attempts=1)
            except InstanceLost:
                return
            except MemServeError as error:
                logger.warning("left to the peer's deadline peer=%s: %s", self._remote.name, error)


def _nonsense(name: str, answer: Message) -> WireMismatch:
    return WireMismatch(f"{name} gave an answer of another kind: {type(answer).__name__}")
