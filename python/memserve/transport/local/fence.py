"""How the owner of memory keeps processes of the same host out: a shared page, and a file lock.

One-sided copies of the kernel do not involve the owner. So the owner publishes its epoch, its regions
and the refused epochs in a memfd that peers map read-only:

    int64[512]   magic · epoch · epoch address · shut · number of fenced epochs · fenced epochs (ring)
    int64[4096, 3]   rows of the RegionTable

Every copy happens under a shared flock on that memfd. To revoke a region or a peer's access, the owner
changes the page, then takes the lock exclusively once: a process that read the old page has finished
or has died by then, since the kernel drops the locks of a dead process. Knows no copies.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from memserve.core.errors import InstanceLost, StaleEpoch, TransferFailed, TransferTimeout
from memserve.core.ids import Epoch
from memserve.transport.regions import MAX_REGIONS, RegionTable, empty_rows

_MAGIC = 0x6D656D7365727665
_HEADER_WORDS = 512
_NUM_BYTES = 8 * _HEADER_WORDS + 24 * MAX_REGIONS
_NAME = "memserve-gate"
_MAGIC_WORD, _EPOCH, _EPOCH_ADDRESS, _SHUT, _NUM_FENCED, _FENCED = 0, 1, 2, 3, 4, 8
_MAX_FENCED = _HEADER_WORDS - _FENCED
_POLL_S = 0.0005


class EpochFence:
    """The owner's end. Its methods are called by one thread at a time."""

    def __init__(self, epoch: Epoch) -> None:
        self.epoch = epoch
        self.fd = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _NUM_BYTES)
        page = mmap.mmap(self.fd, _NUM_BYTES)
        self._header = np.frombuffer(page, np.int64, count=_HEADER_WORDS)
        self._epoch_word = np.array([epoch], np.int64)
        self.regions = RegionTable(empty_rows(memoryview(page)[8 * _HEADER_WORDS :]))
        self._header[_EPOCH] = epoch
        self._header[_EPOCH_ADDRESS] = self._epoch_word.ctypes.data
        self._header[_MAGIC_WORD] = _MAGIC

    def refuse(self, epoch: Epoch) -> None:
        """Refuse access to this epoch. The last 504 refused epochs are remembered."""
        count = int(self._header[_NUM_FENCED])
        self._header[_FENCED + count % _MAX_FENCED] = epoch
        self._header[_NUM_FENCED] = count + 1

    def clear(self, timeout_s: float) -> None:
        """Return when every access that may have seen the previous page has ended.

        Raises TransferTimeout if one has not. Nothing to do after `close`.
        """
        if self.fd < 0:
            return
        deadline = time.monotonic() + timeout_s
        self._header[_SHUT] = 1
        try:
            while not _try_lock(self.fd, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise TransferTimeout("a local peer", timeout_s)
                time.sleep(_POLL_S)
            fcntl.flock(self.fd, fcntl.LOCK_UN)
        finally:
            self._header[_SHUT] = 0

    def close(self) -> None:
        """Refuse every access from now on."""
        if self.fd >= 0:
            self._header[_EPOCH] = 0
            os.close(self.fd)
            self.fd = -1


class RemoteFence:
    """A peer's fence, as this process passes it. Any thread may call any method."""

    def __init__(self, name: str, pid: int, fd: int, epoch: Epoch) -> None:
        """Map the fence of process `pid`, which is its descriptor `fd`.

        Raises InstanceLost if there is no such process, StaleEpoch if it is another one now,
        TransferFailed if the host forbids it.
        """
        self._name = name
        self._epoch = epoch
        self._lock = threading.Lock()
        self._inside = 0
        self._is_closing = False
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise InstanceLost(name, f"no process {pid}") from error
        try:
            self._fd = _open_fence(name, pid, fd, epoch)
        except BaseException:
            os.close(self._pidfd)
            raise
        page = mmap.mmap(self._fd, _NUM_BYTES, prot=mmap.PROT_READ)
        self._header = np.frombuffer(page, np.int64, count=_HEADER_WORDS)
        rows = np.frombuffer(page, np.int64, offset=8 * _HEADER_WORDS).reshape(MAX_REGIONS, 3)
        self.regions = RegionTable(rows)

    @property
    def epoch_address(self) -> int:
        """Address, in that process, of a word that holds its epoch."""
        return int(self._header[_EPOCH_ADDRESS])

    @contextmanager
    def access(self, own_epoch: Epoch, timeout_s: float) -> Iterator[None]:
        """The time in which this process, of epoch `own_epoch`, may access the peer's memory.

        Raises InstanceLost if the peer is dead or has closed its memory, TransferFailed if it refuses
        `own_epoch`, TransferTimeout if it keeps its fence shut.
        """
        deadline = time.monotonic() + timeout_s
        while not self._try_enter():
            if time.monotonic() > deadline:
                raise TransferTimeout(self._name, timeout_s)
            time.sleep(_POLL_S)
        try:
            self.check_alive()
            if self._header[_EPOCH] != self._epoch:
                raise InstanceLost(self._name, "it has closed its memory")
            if self._header[_NUM_FENCED] and own_epoch in self._header[_FENCED:]:
                raise TransferFailed(self._name, "it has fenced this process")
            yield
        finally:
            self._leave()

    def check_alive(self) -> None:
        """Raises InstanceLost if the process has ended: its pid may belong to another one by now."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(0):
            raise InstanceLost(self._name, "the process has ended")

    def close(self) -> None:
        """Unmap the fence after the running accesses."""
        with self._lock:
            self._is_closing = True
            if self._inside == 0:
                self._release()

    def _release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            os.close(self._pidfd)
            self._fd = -1

    def _try_enter(self) -> bool:
        with self._lock:
            if self._is_closing:
                raise InstanceLost(self._name, "it was given up")
            if self._header[_SHUT]:
                return False
            if self._inside == 0:
                if not _try_lock(self._fd, fcntl.LOCK_SH):
                    return False
                if self._header[_SHUT]:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
                    return False
            self._inside += 1
            return True

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
                if self._is_closing:
                    self._release()


def _open_fence(name: str, pid: int, fd: int, epoch: Epoch) -> int:
    path = f"/proc/{pid}/fd/{fd}"
    try:
        if _NAME not in os.readlink(path):
            raise StaleEpoch(name, epoch, None)
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise StaleEpoch(name, epoch, None) from error
    except OSError as error:
        raise TransferFailed(name, f"cannot look into process {pid}: {error.strerror}") from error
    magic, actual = np.frombuffer(os.pread(opened, 16, 0), np.int64)
    if magic != _MAGIC or actual != epoch:
        os.close(opened)
        raise StaleEpoch(name, epoch, Epoch(int(actual)) if magic == _MAGIC and actual else None)
    return opened


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
