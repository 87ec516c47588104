"""Copies between processes of one user on one host, in CPU memory, by process_vm_writev/readv.

The kernel copies from one address space into the other while the peer does nothing: RDMA's
semantics without a device, and any mapped memory will do. Mapping the peer's memfds instead
would make it a memmove, but only memory that was allocated as a memfd can be mapped, and an
engine's KV pools are not; process_vm_writev reaches 0.8 of a memmove over 1024 x 16 KiB
(benchmark/bench_transfer.py), so there is little to win.

A copy is over when its call returns, so no byte is ever late; `fence` keeps out the copies that the
owner has revoked. Knows no network.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from pathlib import Path

import numpy as np

from memserve.core.errors import ConfigError, InstanceLost, StaleEpoch, TransferFailed, TransferTimeout
from memserve.core.ids import Epoch
from memserve.transport.base import Peer, Transport
from memserve.transport.copies import Copies, Vectors, merge_pairs
from memserve.transport.local.fence import EpochFence, RemoteFence
from memserve.transport.local.syscalls import IOV_MAX, Move, ProcessMemory, allow_neighbours
from memserve.transport.regions import Region

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 1.0


class LocalTransport(Transport):
    """The same host, CPU memory."""

    name = "local"

    def __init__(self, epoch: Epoch) -> None:
        """Publish this process's fence. Raises ConfigError if the host forbids such copies altogether."""
        self._epoch = epoch
        self._memory = ProcessMemory()
        self._probe()
        if allow_neighbours():
            logger.info("local transport: processes of this user may now trace this one pid=%d", os.getpid())
        self._lock = threading.Lock()
        self._fence = EpochFence(epoch)
        self._address = f"{host_identity()}/{os.getpid()}/{self._fence.fd}"
        self._remote_fences: dict[Peer, RemoteFence] = {}
        self._closed = False

    @property
    def address(self) -> str:
        """`boot id/pid namespace/pid/descriptor of the fence`."""
        return self._address

    def register(self, region: Region) -> None:
        with self._lock:
            self._fence.regions.add(region)

    def deregister(self, region_id: int, *, timeout_s: float) -> None:
        with self._lock:
            self._fence.regions.remove(region_id)
            self._fence.clear(timeout_s)

    def connect(self, peer: Peer, *, timeout_s: float) -> None:
        """Raises TransferFailed if the host forbids copies into that process."""
        with self._remote_fence(peer).access(self._epoch, timeout_s):
            pass

    def disconnect(self, peer: Peer) -> None:
        with self._lock:
            fence = self._remote_fences.pop(peer, None)
        if fence is not None:
            fence.close()

    def write(self, peer: Peer, copies: Copies, *, timeout_s: float) -> None:
        self._move(peer, copies, timeout_s, self._memory.write)

    def read(self, peer: Peer, copies: Copies, *, timeout_s: float) -> None:
        self._move(peer, copies, timeout_s, self._memory.read)

    def settle(self, peer: Peer, *, timeout_s: float) -> None:
        """Nothing to do: the kernel has stopped copying when a call has returned or failed."""

    def fence(self, epoch: Epoch, *, timeout_s: float) -> None:
        with self._lock:
            self._fence.refuse(epoch)
            self._fence.clear(timeout_s)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._fence.clear(_CLOSE_TIMEOUT_S)
            except TransferTimeout:
                logger.warning("local transport closed while a peer was still copying")
            self._fence.close()

    def _move(self, peer: Peer, copies: Copies, timeout_s: float, move: Move) -> None:
        deadline = time.monotonic() + timeout_s
        lengths = copies.num_bytes
        local = self._fence.regions.resolve(copies.local_regions, copies.local_offsets, lengths)
        fence = self._remote_fence(peer)
        with fence.access(self._epoch, timeout_s):
            remote = fence.regions.resolve(copies.remote_regions, copies.remote_offsets, lengths)
            local, remote, lengths = merge_pairs(local, remote, lengths)
            own, theirs = Vectors(local, lengths), Vectors(remote, lengths)
            while len(own):
                if self._closed:
                    raise TransferFailed(peer.name, "the local transport was closed")
                if time.monotonic() > deadline:
                    raise TransferTimeout(peer.name, timeout_s)
                self._move_some(peer, own, theirs, move)

    def _move_some(self, peer: Peer, own: Vectors, theirs: Vectors, move: Move) -> None:
        """One call: up to 1024 copies, and at most 2 GiB, which is what the kernel does at a time."""
        rows = min(len(own), IOV_MAX)
        try:
            moved = move(_pid(peer), own, theirs, rows)
        except InterruptedError:
            return
        except OSError as error:
            raise _translated(peer, error) from error
        if moved == 0:
            raise TransferFailed(peer.name, "its memory is not mapped")
        own.take(moved)
        theirs.take(moved)

    def _remote_fence(self, peer: Peer) -> RemoteFence:
        fence = self._remote_fences.get(peer)
        if fence is not None:
            return fence
        with self._lock:
            if self._closed:
                raise TransferFailed(peer.name, "the local transport was closed")
            if peer not in self._remote_fences:
                self._remote_fences[peer] = self._open_fence(peer)
            return self._remote_fences[peer]

    def _open_fence(self, peer: Peer) -> RemoteFence:
        """The peer's fence, after a read of the peer's epoch from its memory."""
        if not same_host(self._address, peer.address):
            raise TransferFailed(peer.name, "it is on another host")
        fence = RemoteFence(peer.name, _pid(peer), int(peer.address.rsplit("/", 1)[1]), peer.epoch)
        word = np.zeros(1, np.int64)
        try:
            eight = np.array([8], np.int64)
            theirs = Vectors(np.array([fence.epoch_address], np.int64), eight)
            self._memory.read(_pid(peer), Vectors(np.array([word.ctypes.data], np.int64), eight), theirs, 1)
            fence.check_alive()
            if word[0] != peer.epoch:
                raise StaleEpoch(peer.name, peer.epoch, None)
        except OSError as error:
            fence.close()
            raise _translated(peer, error) from error
        except (InstanceLost, StaleEpoch):
            fence.close()
            raise
        return fence

    def _probe(self) -> None:
        """Read a word of this process: only a system call filter can forbid that."""
        words = np.array([self._epoch, 0], np.int64)
        eight = np.array([8], np.int64)
        source = Vectors(np.array([words.ctypes.data], np.int64), eight)
        target = Vectors(np.array([words.ctypes.data + 8], np.int64), eight)
        try:
            self._memory.read(os.getpid(), target, source, 1)
        except OSError as error:
            raise ConfigError(f"this host forbids process_vm_readv: {error.strerror}") from error


def host_identity() -> str:
    """`boot id/pid namespace`: equal for processes that can name each other by pid."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}/{os.stat('/proc/self/ns/pid').st_ino}"


def same_host(one: str, other: str) -> bool:
    """Whether two `local` addresses belong to one host and pid namespace."""
    return one.split("/")[:2] == other.split("/")[:2]


def _pid(peer: Peer) -> int:
    return int(peer.address.split("/")[2])


def _translated(peer: Peer, error: OSError) -> InstanceLost | TransferFailed:
    if error.errno == errno.ESRCH:
        return InstanceLost(peer.name, "the process has ended")
    if error.errno == errno.EPERM:
        return TransferFailed(peer.name, "the host forbids copies into that process (ptrace permission)")
    return TransferFailed(peer.name, f"copy failed: {error.strerror}")
