"""Sends blocks to a peer: reserve there, write one-sidedly, commit; cancel after a failure.

    Reserve  →                              the peer pins the parent of the blocks
             ←  Reserved(known, addrs)
    write ================================> the peer's arena
    Commit(checksums)  →                    the peer computes checksums, compares, indexes
             ←  Committed(new)
    failed write: settle, then Cancel(settled); if settling fails: Cancel(not settled)
    lost Cancel: sent again with the next exchange; the peer's deadline covers the rest

Knows no sockets. Any thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from memserve.core.block_addr import BlockAddr
from memserve.core.block_keys import BlockKey
from memserve.core.errors import InstanceLost, MemServeError, PeerDeclined, StaleEpoch, WireMismatch
from memserve.core.kv_layout import TransferMode
from memserve.mempool.remote.pools import RemotePool
from memserve.mempool.remote.read_leases import readable
from memserve.mempool.remote.records import Pushed
from memserve.peering.remote_process import PeerConnection
from memserve.wire.messages import Message
from memserve.wire.peer_messages import Cancel, Commit, Committed, Declined, Reserve, Reserved

logger = logging.getLogger(__name__)


def chunk_blocks(block_bytes: int, *, max_blocks: int = 64, max_bytes: int = 8 << 20) -> int:
    """Blocks per reservation or lease; longer chains take several."""
    return max(1, min(max_blocks, max_bytes // block_bytes))


class _Chunk(NamedTuple):
    """Blocks of one reservation: a part of a leased chain."""

    keys: Sequence[BlockKey]
    addrs: Sequence[BlockAddr]
    checksums: Sequence[int]
    parent: BlockKey | None
    """The key before the first one; None at the root of a prompt."""


@dataclass(frozen=True, slots=True)
class GrantedWrite:
    """A reservation at a peer, and the connection under which it was made."""

    connection: PeerConnection
    transfer_id: int
    num_known: int
    addrs: tuple[int, ...]


class Sender:
    """Writes to the pool of one peer. Any thread may call any method."""

    def __init__(
        self, remote: RemotePool, next_id: Callable[[], int], *, max_pending_cancels: int = 64
    ) -> None:
        """`next_id` gives ascending ids, never one twice in this process.

        `max_pending_cancels`: further Cancels are left to the peer's deadline.
        """
        self._max_pending_cancels = max_pending_cancels
        self._remote = remote
        self._next_id = next_id
        self._lock = threading.Lock()
        self._pending_cancels: dict[int, tuple[PeerConnection | None, bool]] = {}

    def transfer_with_insert(
        self, keys: Sequence[BlockKey], parent: BlockKey | None, mode: TransferMode
    ) -> Pushed:
        """See `Peers.transfer_with_insert`."""
        pool = self._remote.pool
        step = chunk_blocks(pool.layout.block_bytes)
        with pool.acquire(readable(pool.match(keys))) as lease:
            done = Pushed()
            checksums = pool.checksums(lease)
            for start in range(0, len(lease), step):
                part = slice(start, start + step)
                before = lease.keys[start - 1] if start else parent
                chunk = _Chunk(lease.keys[part], lease.addrs[part], checksums[part], before)
                try:
                    sent = self._send(chunk, mode)
                except PeerDeclined as error:
                    if not start:
                        raise
                    logger.debug("chain cut short peer=%s after=%d: %s", self._remote.name, start, error)
                    break
                done += sent
                taken = sent.num_known + sent.num_sent
                # Not taken: the peer got the block elsewhere meanwhile, or the checksum differs.
                # In the second case check our own memory.
                if taken < len(chunk.keys) and pool.verify(lease) < start + len(chunk.keys):
                    break
        return done

    def _send(self, chunk: _Chunk, mode: TransferMode) -> Pushed:
        """Write the blocks of `chunk` that the peer lacks, as one reservation, and have them indexed."""

        def send(connection: PeerConnection) -> Pushed:
            granted = self.reserve(connection, chunk.keys, chunk.parent)
            if not granted.addrs:
                return Pushed(num_known=granted.num_known)
            missing = chunk.addrs[granted.num_known :]
            self.write(granted, missing, mode)
            num_new = self.commit(granted, chunk.checksums[granted.num_known :])
            return Pushed(granted.num_known, num_new, len(missing) * self._remote.pool.layout.block_bytes)

        self._send_pending_cancels()
        return self._remote.exchange(send)

    def reserve(
        self, connection: PeerConnection, keys: Sequence[BlockKey], parent: BlockKey | None
    ) -> GrantedWrite:
        """Reserve slots at the peer for the blocks of a chain that it lacks. Raises PeerDeclined."""
        transfer_id = self._next_id()
        digest = self._remote.pool.layout.digest
        try:
            answer = self._remote.ask(Reserve(self._remote.epoch, transfer_id, digest, tuple(keys), parent))
        except InstanceLost:
            self._cancel_later(transfer_id, None, True)
            raise
        if isinstance(answer, Declined):
            raise PeerDeclined(self._remote.name, answer.reason, parent_unknown=answer.parent_unknown)
        if not isinstance(answer, Reserved) or answer.num_known + len(answer.addrs) != len(keys):
            raise _unexpected(self._remote.name, answer)
        return GrantedWrite(connection, transfer_id, answer.num_known, answer.addrs)

    def write(self, granted: GrantedWrite, addrs: Sequence[BlockAddr], mode: TransferMode) -> None:
        """Copy our blocks to the reserved slots; after an error the reservation is or will be cancelled."""
        connection = granted.connection
        try:
            for extents in self._remote.pool.layout.copy_plan(mode):
                copies = self._remote.copies(connection, addrs, granted.addrs, extents)
                connection.transport.write(connection.peer, copies, timeout_s=self._remote.timeout_s)
        except MemServeError as error:
            logger.warning("blocks not written peer=%s: %s", self._remote.name, error)
            self.cancel(granted)
            raise

    def commit(self, granted: GrantedWrite, checksums: Sequence[int]) -> int:
        """End a reservation whose blocks are written; returns the number of blocks that were indexed."""
        try:
            answer = self._remote.ask(Commit(self._remote.epoch, granted.transfer_id, tuple(checksums)))
        except InstanceLost:
            self._cancel_later(granted.transfer_id, None, True)
            raise
        if isinstance(answer, Declined):
            raise PeerDeclined(self._remote.name, answer.reason)
        if not isinstance(answer, Committed):
            raise _unexpected(self._remote.name, answer)
        return answer.num_new

    def cancel(self, granted: GrantedWrite) -> None:
        """Settle the copies of a reservation if possible, and tell the peer. Never raises."""
        transfer_id, connection = granted.transfer_id, granted.connection
        settled = True
        try:
            connection.transport.settle(connection.peer, timeout_s=self._remote.timeout_s)
        except (InstanceLost, StaleEpoch):
            self._cancel_later(transfer_id, None, True)  # Most likely the peer's process has ended.
            return
        except MemServeError as error:
            logger.warning("bytes may still land peer=%s: %s", self._remote.name, error)
            settled = False
        try:
            self._remote.ask(Cancel(self._remote.epoch, transfer_id, settled), attempts=1)
        except MemServeError:
            self._cancel_later(transfer_id, None if settled else connection, settled)
            return
        if not settled:
            self._cancel_later(transfer_id, connection, settled)

    def _cancel_later(self, transfer_id: int, connection: PeerConnection | None, settled: bool) -> None:
        """Send the Cancel before the next exchange, settled first if it was not."""
        with self._lock:
            if len(self._pending_cancels) < self._max_pending_cancels:
                self._pending_cancels[transfer_id] = (connection, settled)

    def _send_pending_cancels(self) -> None:
        with self._lock:
            pending, self._pending_cancels = self._pending_cancels, {}
        for transfer_id, (connection, settled) in pending.items():
            try:
                if connection is not None and not settled:
                    connection.transport.settle(connection.peer, timeout_s=self._remote.timeout_s)
                self._remote.ask(Cancel(self._remote.epoch, transfer_id, True), attempts=1)
            except InstanceLost:
                return
            except MemServeError as error:
                logger.warning("left to the peer's deadline peer=%s: %s", self._remote.name, error)


def _unexpected(name: str, answer: Message) -> WireMismatch:
    return WireMismatch(f"{name} gave an answer of another kind: {type(answer).__name__}")
