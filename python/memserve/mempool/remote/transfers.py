"""The paper's verbs on a peer's pool as work for one thread: reserve, transfer, transfer_with_insert.

    dst=None     reserved on demand, committed at the end; without keys the blocks wait to be claimed
    dst=addrs    of an earlier `reserve`, which with keys is committed, and without goes on

Knows no sockets. Source: MemServe, distributed API (transfer, transfer_with_insert).
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from functools import partial

from memserve.core.block_addr import BlockAddr
from memserve.core.block_keys import BlockKey
from memserve.core.errors import BlockStateError, MemServeError, PeerDeclined, TransferTimeout
from memserve.mempool.remote.faults import HandshakeRequired
from memserve.mempool.remote.local_regions import LocalRegions
from memserve.mempool.remote.records import Pushed
from memserve.mempool.remote.sender import Blocks, GrantedWrite, Sender, chunk_blocks

logger = logging.getLogger(__name__)

MAX_QUEUED = 64


class Ticket:
    """A transfer that was asked for. Any thread."""

    def __init__(self, future: Future[Pushed]) -> None:
        self._future = future

    def done(self) -> bool:
        """Whether `result` returns at once."""
        return self._future.done()

    def result(self, timeout_s: float) -> Pushed:
        """What became of it. Raises what the transfer raised, TransferTimeout if it is not over yet."""
        try:
            return self._future.result(timeout_s)
        except FutureTimeout as error:
            raise TransferTimeout("a transfer in the queue", timeout_s) from error


class RemoteReservation:
    """Blocks of a peer that this process may write; ends once, by `commit`, `cancel` or a transfer.

    Not ended in the peer's `reservation_s`, it ends there. Any thread; one at a time.
    """

    def __init__(
        self, sender: Sender, granted: GrantedWrite, forget: Callable[[RemoteReservation], None]
    ) -> None:
        self.addrs = [BlockAddr(addr) for addr in granted.addrs]
        self.granted = granted
        self.block_bytes = sender.block_bytes
        self._sender = sender
        self._forget = forget
        self._sums: dict[BlockAddr, int] = {}

    def write(self, addrs: Sequence[BlockAddr], blocks: Blocks) -> None:
        """Copy blocks to some of `addrs`. If it raises, the reservation has ended."""
        try:
            self._sender.write(self.granted, addrs, blocks)
        except MemServeError:
            self._forget(self)
            raise
        self._sums.update(zip(addrs, blocks.checksums, strict=True))

    def commit(self, keys: Sequence[BlockKey] = (), parent: BlockKey | None = None) -> int:
        """All blocks are written: they are the peer's, indexed under `keys` or waiting to be claimed.

        Returns how many were indexed. Raises BlockStateError, with the reservation going on, if one is
        not written or there is not a key for each.
        """
        if len(self._sums) != len(self.addrs) or len(keys) not in (0, len(self.addrs)):
            raise BlockStateError(
                f"{len(self._sums)} blocks written, {len(keys)} keys, {len(self.addrs)} reserved"
            )
        self._forget(self)
        return self._sender.commit(self.granted, [self._sums[addr] for addr in self.addrs], keys, parent)

    def cancel(self) -> None:
        """Give the blocks back. Never raises for the peer's failure."""
        self._forget(self)
        self._sender.cancel(self.granted)


class RemoteReservations:
    """Those of this process at its peers, by the addresses they hold. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_addr: dict[BlockAddr, RemoteReservation] = {}

    def add(self, sender: Sender, granted: GrantedWrite) -> RemoteReservation:
        reservation = RemoteReservation(sender, granted, self._forget)
        with self._lock:
            self._by_addr |= dict.fromkeys(reservation.addrs, reservation)
        return reservation

    def of(self, addrs: Sequence[BlockAddr]) -> RemoteReservation:
        """The one that holds all of `addrs`. Raises BlockStateError if there is none."""
        with self._lock:
            holders = {self._by_addr.get(addr) for addr in addrs}
        if len(holders) != 1 or len(set(addrs)) != len(addrs) or (held := holders.pop()) is None:
            raise BlockStateError("the destination is not of one reservation of this process")
        return held

    def _forget(self, reservation: RemoteReservation) -> None:
        with self._lock:
            for addr in reservation.addrs:
                self._by_addr.pop(addr, None)


class Transfers:
    """A bounded queue of transfers and the thread that makes them."""

    def __init__(self, memory: LocalRegions) -> None:
        self._memory = memory
        self._queue: queue.Queue[tuple[Future[Pushed], Callable[[], Pushed]] | None] = queue.Queue(MAX_QUEUED)
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="peer-transfers", daemon=True)
        self._thread.start()

    def submit(self, name: str, action: Callable[[], Pushed]) -> Ticket:
        """Have `action` run. Raises PeerDeclined if the queue is full or closed."""
        future: Future[Pushed] = Future()
        with self._lock:
            if self._is_closed:
                raise PeerDeclined(name, "this end is closed")
            try:
                self._queue.put_nowait((future, action))
            except queue.Full:
                raise PeerDeclined(name, f"{MAX_QUEUED} transfers are waiting already") from None
        return Ticket(future)

    def close(self) -> None:
        """Finish what was asked for, and stop. Idempotent."""
        with self._lock:
            is_first, self._is_closed = not self._is_closed, True
        if is_first:
            self._queue.put(None)
        self._thread.join()

    def to_reservation(
        self,
        reservation: RemoteReservation,
        addrs: Sequence[BlockAddr],
        blocks: Blocks,
        keys: Sequence[BlockKey] | None,
        parent: BlockKey | None,
    ) -> Pushed:
        """Write to reserved blocks, and end their reservation if there are keys."""
        with self._held(reservation.granted, reservation.cancel):
            reservation.write(addrs, blocks)
        num_sent = reservation.commit(keys, parent) if keys is not None else len(addrs)
        return Pushed(0, num_sent, len(addrs) * reservation.block_bytes, tuple(addrs))

    def on_demand(
        self, sender: Sender, blocks: Blocks, keys: Sequence[BlockKey] | None, parent: BlockKey | None
    ) -> Pushed:
        """Write to blocks that are reserved for it, in as many reservations as it takes."""
        step = chunk_blocks(sender.block_bytes)
        done = Pushed()
        for start in range(0, len(blocks.addrs), step):
            part = blocks.part(start, start + step)
            if keys is not None:
                before = keys[start - 1] if start else parent
                done += sender.insert(keys[start : start + step], part, before)
                continue
            granted = sender.allocate(len(part.addrs))
            with self._held(granted, partial(sender.cancel, granted)):
                sender.write(granted, granted.addrs, part)
            sender.commit(granted, part.checksums, (), None)
            num_bytes = len(part.addrs) * sender.block_bytes
            done += Pushed(0, len(part.addrs), num_bytes, tuple(map(BlockAddr, granted.addrs)))
        return done

    @contextmanager
    def _held(self, granted: GrantedWrite, cancel: Callable[[], None]) -> Iterator[None]:
        """Keep the transports open by which a reservation was made, or end it: PeerDeclined."""
        try:
            with self._memory.hold(granted.reached.own_epoch):
                yield
        except HandshakeRequired as error:
            cancel()
            raise PeerDeclined(granted.reached.peer.name, f"reserved in an earlier life: {error}") from error

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                future, action = item
                try:
                    future.set_result(action())
                except MemServeError as error:
                    future.set_exception(error)
        except Exception:
            logger.exception("the transfers' thread failed; this process cannot go on")
            os._exit(1)
