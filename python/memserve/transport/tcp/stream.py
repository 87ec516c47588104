"""One TCP connection as `tcp` uses it: whole messages, deadlines, and bytes straight to addresses.

Knows no requests; see `tcp_wire` for what is said.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from memserve.core.errors import InstanceLost, TransferTimeout
from memserve.transport.copies import Memory, Vectors
from memserve.transport.local.syscalls import SocketVectors

NO_DEADLINE = math.inf

_TIMEVAL = struct.Struct("@ll")
_ABORT = struct.pack("@ii", 1, 0)
_DISCARD_BYTES = 1 << 16
_SLICE_S = 1.0
"""What a call waits at most before it is made again: far deadlines need no timeout of their own each."""


class Stream:
    """A connected socket. One thread uses it; `cut` may come from any.

    The kernel tunes the buffers itself: fixed ones of 2 MiB were no faster.

    Every call raises InstanceLost when the other end is gone, TransferTimeout when `deadline`
    (time.monotonic()) has passed; the stream is unusable after either.
    """

    def __init__(self, connection: socket.socket, name: str, calls: SocketVectors) -> None:
        """Own `connection`, which is blocking; `name` is what errors call the other end."""
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.name = name
        self._socket = connection
        self._calls = calls
        # what the kernel has been told; 0 is none
        self._limits: dict[int, float] = {socket.SO_SNDTIMEO: 0.0, socket.SO_RCVTIMEO: 0.0}

    def send(self, head: bytes, memory: Memory, deadline: float) -> None:
        """Hand a short message and then all of `memory` to the kernel."""
        if isinstance(memory, memoryview):
            self._send_both(head, memory, deadline)
            return
        self.send_bytes(head, deadline, socket.MSG_MORE if len(memory) else 0)
        while len(memory):
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                memory.take(self._calls.send(self._socket.fileno(), memory))
            except OSError as error:
                self._check(error, deadline)

    def receive(self, memory: Memory, deadline: float) -> None:
        """Fill all of `memory`."""
        while len(memory):
            self._limit(socket.SO_RCVTIMEO, deadline)
            try:
                if isinstance(memory, memoryview):
                    received = self._socket.recv_into(memory, 0, socket.MSG_WAITALL)
                else:
                    received = self._calls.receive(self._socket.fileno(), memory)
            except OSError as error:
                self._check(error, deadline)
                continue
            self._check_open(received)
            if isinstance(memory, memoryview):
                memory = memory[received:]
            else:
                memory.take(received)

    def send_bytes(self, data: bytes, deadline: float, flags: int = 0) -> None:
        """Send a short message."""
        while data:
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                data = data[self._socket.send(data, flags | socket.MSG_NOSIGNAL) :]
            except OSError as error:
                self._check(error, deadline)

    def receive_bytes(self, num_bytes: int, deadline: float) -> bytes:
        """A short message of known length."""
        data = b""
        while len(data) < num_bytes:
            self._limit(socket.SO_RCVTIMEO, deadline)
            try:
                more = self._socket.recv(num_bytes - len(data), socket.MSG_WAITALL)
            except OSError as error:
                self._check(error, deadline)
                continue
            self._check_open(len(more))
            data += more
        return data

    def discard(self, num_bytes: int, deadline: float) -> None:
        """Read past `num_bytes` bytes."""
        while num_bytes:
            num_bytes -= len(self.receive_bytes(min(num_bytes, _DISCARD_BYTES), deadline))

    def cut(self) -> None:
        """End the connection under the feet of the thread that uses it. Any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Release the socket; only the thread that uses it."""
        self._socket.close()

    def abort(self) -> None:
        """Release the socket and drop what is still on its way; only the thread that uses it."""
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self._socket.close()

    def _send_both(self, head: bytes, view: memoryview, deadline: float) -> None:
        """One system call, as long as the kernel takes it all."""
        while head or view:
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                sent = self._socket.sendmsg((head, view), (), socket.MSG_NOSIGNAL)
            except OSError as error:
                self._check(error, deadline)
                continue
            view = view[max(sent - len(head), 0) :]
            head = head[sent:]

    def _limit(self, option: int, deadline: float) -> None:
        """The kernel's own timeout keeps the calls blocking, which is what makes them fast."""
        limit = 0.0  # which means none
        if deadline != NO_DEADLINE:
            limit = min(max(deadline - time.monotonic(), 1e-6), _SLICE_S)
        if self._limits[option] == limit:
            return
        self._limits[option] = limit
        seconds, microseconds = divmod(math.ceil(limit * 1e6), 10**6)
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(seconds, microseconds))

    def _check(self, error: OSError, deadline: float) -> None:
        """Return if the call is to be made again."""
        if isinstance(error, InterruptedError):
            return
        if not isinstance(error, BlockingIOError):
            raise InstanceLost(self.name, f"connection lost: {error.strerror}") from error
        if time.monotonic() >= deadline:
            raise TransferTimeout(self.name, 0) from error

    def _check_open(self, received: int) -> None:
        if not received:
            raise InstanceLost(self.name, "the connection was closed")


def vectors_of(*arrays: npt.NDArray[Any]) -> Vectors:
    """The bytes of contiguous arrays, which the caller keeps alive."""
    pointers = np.array([array.ctypes.data for array in arrays], np.int64)
    lengths = np.array([array.nbytes for array in arrays], np.int64)
    return Vectors(pointers[lengths > 0], lengths[lengths > 0])
