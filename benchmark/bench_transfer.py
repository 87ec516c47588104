"""How fast each transport writes into another process, against memmove and a plain socket.

    python benchmark/bench_transfer.py [--quick] [--transports local tcp mooncake] [--repeats N]

Every shape is measured for all subjects in turn, round after round, over buffers larger than the
caches. GB/s are 1e9 bytes; figures are medians. The plain socket is a blocking `sendmsg` from the
scattered segments and `recv_into` one contiguous buffer of the other process, which then
acknowledges: the least that any TCP transport has to do.
"""

from __future__ import annotations

import argparse
import ctypes
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from figures import measure_together, progress, report
from memserve.core.errors import ConfigError
from memserve.core.ids import new_epoch
from memserve.testing.transport_peer import PeerProcess, open_transport
from memserve.transport.base import Peer, Transport
from memserve.transport.copies import Copies
from memserve.transport.regions import Region

BUFFER_BYTES = 1 << 30
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Shape:
    name: str
    count: int
    size: int

    @property
    def num_bytes(self) -> int:
        return self.count * self.size


SHAPES = (
    Shape("64KiB", 1, 64 * KIB),
    Shape("1MiB", 1, MIB),
    Shape("16MiB", 1, 16 * MIB),
    Shape("256x64KiB", 256, 64 * KIB),
    Shape("1024x16KiB", 1024, 16 * KIB),
)


class Segments:
    """Where a shape's segments lie, differently for every turn: scattered, and cold by then."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        slots = BUFFER_BYTES // shape.size
        generator = np.random.default_rng(1)
        self._source = generator.permutation(slots).astype(np.int64) * shape.size
        self._target = generator.permutation(slots).astype(np.int64) * shape.size
        self._turns = slots // shape.count
        self.lengths = np.full(shape.count, shape.size, np.int64)

    def at(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target offsets of this turn."""
        start = turn % self._turns * self._shape.count
        rows = slice(start, start + self._shape.count)
        return self._source[rows], self._target[rows]


class Subject:
    """Something that moves a shape's bytes once per call, each call elsewhere."""

    def __init__(self, move: Callable[[np.ndarray, np.ndarray], object], segments: Segments) -> None:
        self._move = move
        self._segments = segments
        self._turn = 0

    def __call__(self) -> None:
        source, target = self._segments.at(self._turn)
        self._turn += 1
        self._move(source, target)


def transport_subject(transport: Transport, peer: Peer, segments: Segments) -> Subject:
    ones = np.ones(len(segments.lengths), np.int64)

    def move(source: np.ndarray, target: np.ndarray) -> None:
        transport.write(peer, Copies(ones, source, ones, target, segments.lengths), timeout_s=30)

    return Subject(move, segments)


def memmove_subject(memory: np.ndarray, other: np.ndarray, segments: Segments) -> Subject:
    libc = ctypes.CDLL(None)
    libc.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    libc.memmove.restype = None
    size = int(segments.lengths[0])

    def move(source: np.ndarray, target: np.ndarray) -> None:
        sources, targets = memory.ctypes.data + source, other.ctypes.data + target
        for a, b in zip(sources.tolist(), targets.tolist(), strict=True):
            libc.memmove(b, a, size)

    return Subject(move, segments)


class SocketPeer:
    """The plain socket's other process."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            self._child = subprocess.Popen([sys.executable, __file__, "--receive", str(port)])
            self._socket, _ = listener.accept()
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def subject(self, memory: np.ndarray, segments: Segments) -> Subject:
        size = int(segments.lengths[0])
        total = int(segments.lengths.sum())
        view = memory.data

        def move(source: np.ndarray, target: np.ndarray) -> None:
            self._socket.sendall(total.to_bytes(8, "little") + int(target[0]).to_bytes(8, "little"))
            parts = [view[at : at + size] for at in source.tolist()]
            sent = self._socket.sendmsg(parts)
            while sent < total:  # the rest of the segment that was cut, then whole ones
                first, into = divmod(sent, size)
                sent += self._socket.sendmsg([parts[first][into:], *parts[first + 1 :]])
            self._socket.recv(1)

        return Subject(move, segments)

    def close(self) -> None:
        self._socket.close()
        self._child.wait()


def receive(port: int) -> None:
    """The child: length, offset, bytes; then one byte back."""
    memory = np.ones(BUFFER_BYTES + 16 * MIB, np.uint8).data
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while head := connection.recv(16, socket.MSG_WAITALL):
            left, at = int.from_bytes(head[:8], "little"), int.from_bytes(head[8:], "little")
            while left:
                received = connection.recv_into(memory[at : at + left])
                at, left = at + received, left - received
            connection.sendall(b"k")


def open_pairs(names: list[str], memory: np.ndarray) -> dict[str, tuple[Transport, PeerProcess]]:
    pairs = {}
    for name in names:
        try:
            transport = open_transport(name, new_epoch())
        except ConfigError as error:
            progress(f"{name}: left out: {error}")
            continue
        transport.register(Region(1, memory.ctypes.data, memory.nbytes))
        child = PeerProcess(name, BUFFER_BYTES)
        child.ask("fill", value=1)
        pairs[name] = (transport, child)
    return pairs


def bench(shape: Shape, subjects: dict[str, Subject], repeats: int) -> dict[str, list[float]]:
    """GB/s of each subject; a sample is as many calls as move 16 MiB."""
    calls = max(1, 16 * MIB // shape.num_bytes)

    def several(subject: Subject) -> Callable[[], None]:
        def call() -> None:
            for _ in range(calls):
                subject()

        return call

    seconds = measure_together([several(subject) for subject in subjects.values()], repeats, warmup=2)
    num_bytes = shape.num_bytes * calls
    return {name: [num_bytes / s / 1e9 for s in taken] for name, taken in zip(subjects, seconds, strict=True)}


def report_shape(shape: Shape, rates: dict[str, list[float]]) -> None:
    for name in ("memmove", "socket"):
        report(f"micro/transfer/{name}/{shape.name}", rates[name], "GB/s")
    scattered = shape.name == "1024x16KiB"
    if "local" in rates:
        target = 0.6 if scattered else None
        report(
            f"micro/transfer/local/{shape.name}/memmove",
            rates["local"],
            "GB/s",
            baseline=rates["memmove"],
            target=target,
        )
    if "tcp" in rates:
        report(
            f"micro/transfer/tcp/{shape.name}/socket",
            rates["tcp"],
            "GB/s",
            baseline=rates["socket"],
            target=0.8,
        )
    if "mooncake" in rates:
        report(
            f"micro/transfer/mooncake/{shape.name}/socket",
            rates["mooncake"],
            "GB/s",
            baseline=rates["socket"],
        )
    if "mooncake" in rates and "local" in rates:
        target = 5.0 if scattered else None
        report(
            f"micro/transfer/local/{shape.name}/mooncake",
            rates["local"],
            "GB/s",
            baseline=rates["mooncake"],
            target=target,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transports", nargs="+", default=["local", "tcp", "mooncake"])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--repeats", type=int, metavar="N", help="(default: 9; --quick: 4)")
    parser.add_argument("--receive", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive:
        receive(arguments.receive)
        return
    repeats = arguments.repeats or (4 if arguments.quick else 9)
    memory = np.ones(BUFFER_BYTES, np.uint8)
    other = np.ones(BUFFER_BYTES, np.uint8)
    pairs = open_pairs(arguments.transports, memory)
    plain = SocketPeer()
    for shape in SHAPES:
        segments = Segments(shape)
        subjects = {
            "memmove": memmove_subject(memory, other, segments),
            "socket": plain.subject(memory, segments),
        }
        for name, (transport, child) in pairs.items():
            subjects[name] = transport_subject(transport, child.peer, segments)
        rates = bench(shape, subjects, repeats)
        progress(
            f"{shape.name:>12} "
            + "  ".join(f"{name} {statistics.median(taken):6.2f}" for name, taken in rates.items())
        )
        report_shape(shape, rates)
    plain.close()
    for transport, child in pairs.values():
        transport.close()
        child.kill()


if __name__ == "__main__":
    main()
