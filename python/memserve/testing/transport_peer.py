"""A process with one transport and some memory: the peer in the conformance suite and the benchmark.

    python -m memserve.testing.transport_peer local|tcp|mooncake NUM_BYTES [PORT]

Knows no test. `transport_process` has the protocol that drives it.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from typing import Any

import numpy as np

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import MemServeError
from memserve.core.ids import Epoch, new_epoch
from memserve.testing.transport_process import ChildProcess, serve
from memserve.transport.base import Peer, Transport
from memserve.transport.copies import Copies, Copy
from memserve.transport.local.transport import LocalTransport
from memserve.transport.mooncake import MooncakeTransport
from memserve.transport.regions import Region, RegionTable
from memserve.transport.tcp.client import TcpTransport

TIMEOUT_S = 10.0


def open_transport(name: str, epoch: Epoch, port: int = 0) -> Transport:
    """A transport of this name on loopback, with the test key."""
    if name == "local":
        return LocalTransport(epoch)
    if name == "tcp":
        return TcpTransport(epoch, "127.0.0.1", port, key=ClusterKey(b"only for the tests"))
    if name == "mooncake":
        return MooncakeTransport(epoch, "127.0.0.1", "tcp")
    raise ValueError(name)


class PeerProcess(ChildProcess):
    """The test's handle of the child process."""

    def __init__(self, name: str, num_bytes: int, port: int = 0) -> None:
        super().__init__("-m", "memserve.testing.transport_peer", name, str(num_bytes), str(port))
        table = RegionTable()
        table.add(Region(*self.greeting["region"]))
        self.region_id: int = self.greeting["region"][0]
        self.peer = Peer("child", Epoch(self.greeting["epoch"]), self.greeting["address"], table)

    def bytes(self, start: int, stop: int) -> bytes:
        """Bytes of the child's region."""
        return bytes.fromhex(self.ask("bytes", start=start, stop=stop))

    def digest(self, start: int, stop: int) -> str:
        """SHA-256 of these bytes of the child's region."""
        return str(self.ask("digest", start=start, stop=stop))


class _VerbServer:
    """Executes the verbs in the child."""

    def __init__(self, name: str, num_bytes: int, port: int) -> None:
        self._epoch = new_epoch()
        self._transport = open_transport(name, self._epoch, port)
        self._memory = np.zeros(num_bytes, np.uint8)
        self._region = Region(1, self._memory.ctypes.data, num_bytes)
        self._transport.register(self._region)
        self._flood = _Flood()

    def greeting(self) -> dict[str, object]:
        region = (self._region.region_id, self._region.address, self._region.num_bytes)
        return {"epoch": self._epoch, "address": self._transport.address, "region": region}

    def fill(self, value: int) -> None:
        self._memory[:] = value

    def bytes(self, start: int, stop: int) -> str:
        return self._memory[start:stop].tobytes().hex()

    def digest(self, start: int, stop: int) -> str:
        return hashlib.sha256(self._memory[start:stop].data).hexdigest()

    def deregister(self) -> None:
        self._transport.deregister(self._region.region_id, timeout_s=TIMEOUT_S)

    def flood(self, epoch: int, address: str, region: list[int]) -> None:
        """Write this region over the caller's region repeatedly, until a write fails."""
        table = RegionTable()
        table.add(Region(*region))
        peer = Peer("parent", Epoch(epoch), address, table)
        self._memory[:] = 0xEE
        copies = Copies.of([Copy(self._region.region_id, 0, region[0], 0, region[2])])
        self._flood.start(self._transport, peer, copies)

    def flood_end(self) -> str:
        """The name of the error that ended the flood."""
        return self._flood.end()

    def verbs(self) -> dict[str, Any]:
        chosen = (self.fill, self.bytes, self.digest, self.deregister, self.flood, self.flood_end)
        return {verb.__name__: verb for verb in chosen}


class _Flood:
    """Writes in the background until a write fails."""

    def __init__(self) -> None:
        self._error = ""
        self._thread: threading.Thread | None = None

    def start(self, transport: Transport, peer: Peer, copies: Copies) -> None:
        transport.write(peer, copies, timeout_s=TIMEOUT_S)
        self._thread = threading.Thread(target=self._run, args=(transport, peer, copies), daemon=True)
        self._thread.start()

    def end(self) -> str:
        assert self._thread is not None
        self._thread.join(TIMEOUT_S)
        return self._error

    def _run(self, transport: Transport, peer: Peer, copies: Copies) -> None:
        try:
            while True:
                transport.write(peer, copies, timeout_s=TIMEOUT_S)
        except MemServeError as error:
            self._error = type(error).__name__


def main() -> None:
    """Serve until the parent process ends."""
    name, num_bytes, port = sys.argv[1:]
    server = _VerbServer(name, int(num_bytes), int(port))
    serve(server.greeting(), server.verbs())


if __name__ == "__main__":
    main()
