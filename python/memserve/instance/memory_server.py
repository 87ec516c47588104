"""A server that only lends its DRAM to the other instances of a cluster.

    GET /health            200: the process lives
    GET /readiness         200 once a router has accepted it, else 503
    GET /mempool           JSON: the budget, one report per layout, the exchange with peers
    GET /mempool/metrics   the same numbers for Prometheus

Knows no model, no SGLang and no torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from types import TracebackType
from typing import Any, NoReturn

from memserve.core.caching import CachingMode
from memserve.core.errors import ConfigError
from memserve.core.hosts import bracketed
from memserve.core.ids import InstanceId
from memserve.core.memory import free_memory_bytes
from memserve.instance.membership import Membership
from memserve.instance.memory_budget import LayoutUsage, MemoryBudget
from memserve.instance.metrics import CONTENT_TYPE, exposition
from memserve.instance.pool_agent import tier_blocks
from memserve.instance.publisher import Publisher, ReportSource
from memserve.mempool.events import digest
from memserve.mempool.eviction import EVICTION_POLICIES, EvictionName
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.config import PeersConfig
from memserve.mempool.remote.peers import Peers
from memserve.peering.endpoint import TransferEndpoint
from memserve.transport.registry import TransportConfig, open_transports
from memserve.wire.link import ControlClient
from memserve.wire.messages import PoolInfo, Role

logger = logging.getLogger(__name__)

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """The settings of a memory server. Raises ConfigError for a size that it cannot lend."""

    instance_id: InstanceId
    router: str
    """Its control address."""
    dram_bytes: int
    transport: TransportConfig
    port: int
    """Port of the HTTP pages; 0: the system picks one."""
    caching: CachingMode = CachingMode.FULL
    eviction: EvictionName = "lru"
    peers: PeersConfig = field(default_factory=PeersConfig)
    balance_s: float = 1.0
    """Period in which pools are brought nearer to their shares."""
    unused_s: float = 600.0
    """A layout without a member for this time counts as unused: longer than a restart takes."""
    share_of_free: float = 0.9
    """Share of the free memory that may be lent: the process itself needs the rest."""

    def __post_init__(self) -> None:
        if self.dram_bytes < 1:
            raise ConfigError("--dram-gib has to be more than 0: a memory server lends nothing else")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port {self.port} is not a port")


def read_flags(argv: Sequence[str]) -> tuple[str, int]:
    """--host and --port, of what stands on the command line beside the launcher's own flags.

    Raises ConfigError, in one line, for anything else.
    """
    parser = _OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    known, others = parser.parse_known_args(argv)
    if others:
        raise ConfigError(
            f"{others[0]} makes no sense with --role memory, which runs no model and no SGLang: "
            "it takes --host and --port"
        )
    return known.host, known.port


def run(config: MemoryConfig) -> None:
    """Lend until SIGTERM or Ctrl-C. Main thread only. Raises ConfigError if it cannot start."""
    logging.basicConfig(
        level=logging.INFO,
        format="[%(asctime)s] %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    with MemoryServer(config) as server:
        while not stopping.wait(0 if server.balance() else config.balance_s):
            pass
        logger.info("memory stopping")
    logger.info("memory stopped")


class MemoryServer:
    """The composition of a memory server. A context manager that closes its parts in order."""

    def __init__(self, config: MemoryConfig) -> None:
        """Listens and begins to register. Raises ConfigError if it cannot have the memory or an address."""
        _check_room(config)
        self._config = config
        host = config.transport.host
        self._last_use = LayoutUsage(time.monotonic, config.unused_s)
        self._pages = _Pages(host, config.port, self)
        try:
            endpoint = TransferEndpoint(config.transport)
            epoch, self._key = endpoint.epoch, endpoint.key
            eviction = EVICTION_POLICIES[config.eviction]
            self.budget = MemoryBudget(config.dram_bytes, epoch, eviction=eviction, on_resized=self._resized)
            opened = partial(open_transports, config.transport, self._key)
            self.peers = Peers(endpoint, opened, self.budget.pool_of, config.peers)
        except BaseException:
            self._pages.server_close()
            raise
        self.url = f"http://{bracketed(host)}:{self._pages.server_port}"
        logger.info(
            "memory ready http=%s control=%s dram_gib=%.3g",
            self.url,
            endpoint.address.control,
            config.dram_bytes / _GIB,
        )
        info = PoolInfo(
            instance_id=config.instance_id,
            epoch=epoch,
            role=Role.MEMORY,
            caching=config.caching,
            address=endpoint.address.control,
            layout="",
        )
        client = ControlClient(config.router, key=self._key)
        self.members = Membership(
            client, info, on_gone=self.peers.gone, tiers=lambda: tier_blocks(self.budget.pools())
        )
        self._epoch = epoch
        self._publishers: dict[bytes, Publisher] = {}
        self._serving = threading.Thread(
            target=self._pages.serve_forever, args=(0.1,), name="pages", daemon=True
        )
        self._serving.start()

    def balance(self) -> bool:
        """Publish new pools, bring all one step nearer to their shares; whether a size has changed."""
        for pool in self.budget.pools():
            if pool.layout.rank == 0 and pool.layout.digest not in self._publishers:
                self._publishers[pool.layout.digest] = self._publish(pool)
        of_members = {info.layout for info in self.members.pools()}
        digests = [pool.layout.digest for pool in self.budget.pools()]
        return self.budget.balance(self._last_use.unused(digests, of_members))

    def report(self) -> dict[str, Any]:
        """The content of `/mempool`."""
        return {
            "role": Role.MEMORY.value,
            "instance_id": self._config.instance_id,
            "registered": self.members.registered,
            "budget_bytes": self._config.dram_bytes,
            "pools": [
                {
                    "labels": {"layout": pool.layout.digest.hex()},
                    "pool": asdict(pool.stats()),
                    "digest": {tier.name.lower(): digest(nodes) for tier, nodes in pool.cached()[1]},
                }
                for pool in self.budget.pools()
            ],
            "peers": asdict(self.peers.stats()),
        }

    def metrics(self) -> str:
        """The content of `/mempool/metrics`."""
        report = self.report()
        return exposition([*report["pools"], {"labels": {}, "peers": report["peers"]}])

    def close(self) -> None:
        """Deregister, then stop answering, then give the memory back. Takes at most a few seconds."""
        for publisher in self._publishers.values():
            publisher.close()
        self.members.close()
        self._pages.shutdown()
        self._serving.join()
        self._pages.server_close()
        self.peers.close()
        self.budget.close()

    def _publish(self, pool: MemPool) -> Publisher:
        """Report a pool to the router; the ranks of an instance hold the same blocks, so one reports."""
        client = ControlClient(self._config.router, key=self._key)
        layout = pool.layout.digest.hex()
        return Publisher(client, ReportSource(self._epoch, pool.take_events, pool.snapshot, layout))

    def _resized(self, pool: MemPool) -> None:
        self.peers.resized(pool)

    def __enter__(self) -> MemoryServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Pages(ThreadingHTTPServer):
    """The HTTP pages, each request on a thread of its own."""

    daemon_threads = True

    def __init__(self, host: str, port: int, memory: MemoryServer) -> None:
        self.memory = memory
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Page)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error

    def server_bind(self) -> None:
        """As HTTPServer's, which also asks the network for the host's name, and may wait for it."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]


class _Page(BaseHTTPRequestHandler):
    server: _Pages

    def do_GET(self) -> None:
        """Answer one request."""
        memory = self.server.memory
        match self.path.partition("?")[0]:
            case "/health":
                self._answer(200, "text/plain", "OK")
            case "/readiness" if memory.members.registered:
                self._answer(200, "text/plain", "OK")
            case "/readiness":
                self._answer(503, "text/plain", "no router has accepted this server yet")
            case "/mempool":
                self._answer(200, "application/json", json.dumps(memory.report()))
            case "/mempool/metrics":
                self._answer(200, CONTENT_TYPE, memory.metrics())
            case path:
                self._answer(404, "text/plain", f"no page {path}: this server only lends memory")

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("http " + format, *args)

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _check_room(config: MemoryConfig) -> None:
    free = free_memory_bytes()
    if config.dram_bytes > free * config.share_of_free:
        raise ConfigError(
            f"--dram-gib {config.dram_bytes / _GIB:.3g} does not fit: {free / _GIB:.2f} GiB are free, "
            f"of which {free * config.share_of_free / _GIB:.2f} GiB can be lent"
        )
