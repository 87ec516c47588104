"""The few system calls that Python's library does not offer, each without the GIL.

Knows no protocol. Addresses are absolute; nothing here checks that they are mapped.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

from memserve.core.errors import ConfigError
from memserve.transport.copies import Vectors

IOV_MAX = 1024
"""Vectors that one call takes on Linux."""

_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)
_MSG_NOSIGNAL = 0x4000
_MSG_WAITALL = 0x100

Move = Callable[[int, Vectors, Vectors, int], int]
"""(pid, own vectors, that process's vectors, rows) -> bytes moved; raises OSError."""


class _MessageHeader(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vectors", ctypes.c_void_p),
        ("num_vectors", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class ProcessMemory:
    """process_vm_writev and process_vm_readv: copies between this process's memory and another's."""

    def __init__(self) -> None:
        """Raises ConfigError if the C library has no such calls."""
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            self._calls = (libc.process_vm_writev, libc.process_vm_readv)
        except AttributeError as error:
            raise ConfigError("this C library has no process_vm_writev") from error
        for call in self._calls:
            call.restype = ctypes.c_ssize_t
            call.argtypes = (
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_ulong,
                ctypes.c_void_p,
                ctypes.c_ulong,
                ctypes.c_ulong,
            )

    def write(self, pid: int, own: Vectors, theirs: Vectors, rows: int) -> int:
        """Copy the first `rows` vectors of `own` over those of `theirs`; returns the bytes moved."""
        return _checked(self._calls[0](pid, own.pointer, rows, theirs.pointer, rows, 0))

    def read(self, pid: int, own: Vectors, theirs: Vectors, rows: int) -> int:
        """Copy the first `rows` vectors of `theirs` over those of `own`; returns the bytes moved."""
        return _checked(self._calls[1](pid, own.pointer, rows, theirs.pointer, rows, 0))


class SocketVectors:
    """sendmsg and recvmsg on vectors of plain addresses: no Python object per segment."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._sendmsg, self._recvmsg = libc.sendmsg, libc.recvmsg
        for call in (self._sendmsg, self._recvmsg):
            call.restype = ctypes.c_ssize_t
            call.argtypes = (ctypes.c_int, ctypes.POINTER(_MessageHeader), ctypes.c_int)

    def send(self, fd: int, vectors: Vectors) -> int:
        """Send from the front of `vectors`; returns the bytes the kernel took. Raises OSError."""
        return _checked(self._sendmsg(fd, self._header(vectors), _MSG_NOSIGNAL))

    def receive(self, fd: int, vectors: Vectors) -> int:
        """Fill the front of `vectors`, waiting for all of it; returns bytes, 0 at the end of the stream."""
        return _checked(self._recvmsg(fd, self._header(vectors), _MSG_WAITALL))

    def _header(self, vectors: Vectors) -> _MessageHeader:
        return _MessageHeader(vectors=vectors.pointer, num_vectors=min(len(vectors), IOV_MAX))


def allow_neighbours() -> bool:
    """Where Yama lets only ancestors into a process, let every process of this user into this one.

    Returns whether that was needed and granted.
    """
    try:
        restricted = Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip() == "1"
    except OSError:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return restricted and libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0) == 0


def _checked(result: int) -> int:
    if result >= 0:
        return result
    code = ctypes.get_errno()
    if code == errno.EINTR:
        raise InterruptedError(code, os.strerror(code))
    raise OSError(code, os.strerror(code))
