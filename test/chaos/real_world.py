"""A router, two prefills, two decodes and a memory instance: real processes, with test links between."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import random
import re
import signal
import socket
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

from memserve.testing.cluster import ServerProcess, wait_for
from memserve.testing.faulty_link import ControlLink, Faults, FaultyLink, FaultyProxy
from memserve.wire.link import ControlClient
from memserve.wire.messages import Message, Register, RegisterPool, Role

from .router_process import RouterProcess, limit_files
from .tcp_link import TcpLink

START_S = 300.0
SETTLE_S = 40.0
"""Blocks of a dead peer stay in quarantine until it is known to be dead."""
HELD = ("private", "reserved", "quarantined", "leases")
HBM_TOKENS = 4096
DRAM_GIB = 0.05
ROUTER_FLAGS = ("--heartbeat-secs", "1", "--request-timeout-secs", "60", "--shutdown-grace-period-secs", "1")


class _Rewriting:
    """A control link to the router that replaces the server's addresses by those of the test's links."""

    def __init__(self, server: Server, router: str) -> None:
        self._server = server
        self._inner = ControlClient(router)

    def request(self, message: Message, *, timeout_s: float) -> Message:
        """As `ControlClient.request`."""
        if isinstance(message, Register):
            message = Register(
                msgspec.structs.replace(message.info, url=f"http://127.0.0.1:{self._server.link.port}")
            )
        if isinstance(message, RegisterPool):
            address = self._server.pool_address(message.info.address)
            message = RegisterPool(msgspec.structs.replace(message.info, address=address))
        return self._inner.request(message, timeout_s=timeout_s)

    def close(self) -> None:
        """As `ControlClient.close`."""
        self._inner.close()


class Server:
    """One process of the cluster, which keeps its name and address over a restart."""

    def __init__(self, name: str, role: Role, router: str, directory: Path, flags: list[str]) -> None:
        self.name = name
        self.role = role
        self.link = TcpLink()
        """The link from the router to its HTTP server."""
        self.faults = Faults()
        """The faults of its messages to the router."""
        self.pool_faults = Faults()
        """The faults of the messages to its pool."""
        self._port = free_port()
        self._directory = directory
        self._count = 0
        self._pools: dict[str, FaultyProxy] = {}
        self._control = FaultyProxy(FaultyLink(_Rewriting(self, router), self.faults))
        self._flags = ["--router", self._control.address, "--port", str(self._port), *flags]

    @property
    def url(self) -> str:
        """URL of the server itself, without the link."""
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Start it; see `ready`."""
        if not self.link.port:
            await self.link.open()
            self.link.lead_to(self._port)
        self._count += 1
        argv = ["memserve.launch_server", "--role", str(self.role), "--instance-id", self.name, *self._flags]
        self.process = ServerProcess(self.name, argv, self._directory / f"{self.name}-{self._count}.log")

    async def ready(self) -> None:
        """Returns when it has registered. Raises ClusterFailed."""
        kind = "pool" if self.role is Role.MEMORY else "instance"
        line = re.compile(rf" registered router=\S+ {kind}={re.escape(self.name)}$", re.MULTILINE)
        process = self.process
        await asyncio.to_thread(
            wait_for, lambda: line.search(process.output()), [process], what=self.name, timeout_s=START_S
        )

    async def restart(self) -> None:
        """Start it, and wait until it is ready."""
        await self.start()
        await self.ready()

    async def kill(self) -> None:
        """SIGKILL, all of its processes."""
        await asyncio.to_thread(self.process.kill)

    async def freeze(self) -> None:
        """SIGSTOP, all of its processes."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    async def thaw(self) -> None:
        """SIGCONT."""
        os.killpg(self.process.pid, signal.SIGCONT)

    async def fill_disk(self) -> None:
        """Keep its logs from growing, as on a full disk."""
        for pid in self._pids():
            limit_files(pid, 1)

    async def free_disk(self) -> None:
        """End that."""
        for pid in self._pids():
            limit_files(pid, None)

    async def spoil(self) -> None:
        """Change one byte in every 64 of all DRAM of its pools."""
        await asyncio.to_thread(lambda: [_spoil(arena) for pid in self._pids() for arena in _arenas(pid)])

    def pool_address(self, address: str) -> str:
        """The address under which other processes reach the pool at `address`. Any thread."""
        if address not in self._pools:
            self._pools[address] = FaultyProxy(FaultyLink(_client(address), self.pool_faults))
        return self._pools[address].address

    async def close(self) -> None:
        """Stop it for good."""
        await self.kill()
        await self.link.close()
        for proxy in (self._control, *self._pools.values()):
            await asyncio.to_thread(proxy.close)

    def _pids(self) -> list[int]:
        stats = {path: _stat(path) for path in Path("/proc").glob("[0-9]*/stat")}
        return [int(path.parent.name) for path, stat in stats.items() if stat[3:4] == [str(self.process.pid)]]


class RealWorld:
    """See the module. A context manager."""

    name = "servers"

    def __init__(self, directory: Path, model: Path) -> None:
        self._directory = directory
        self._model = model
        self.router = RouterProcess(directory, ROUTER_FLAGS)
        self.servers: dict[str, Server] = {}
        self._stack = AsyncExitStack()

    @property
    def url(self) -> str:
        return self.router.url

    def workers(self) -> frozenset[str]:
        """The servers that take requests."""
        return frozenset(name for name, one in self.servers.items() if one.role is not Role.MEMORY)

    async def leaks(self) -> list[str]:
        """Resources that the router, the servers or their pools still hold."""
        async with aiohttp.ClientSession() as session:
            held: list[str] = []
            for _ in range(int(SETTLE_S / 0.25)):
                held = await self._held(session)
                if not held:
                    break
                await asyncio.sleep(0.25)
            return held

    async def unused_tokens(self) -> dict[str, int]:
        """KV slots in use by server after a flush: 0 if none has leaked."""
        async with aiohttp.ClientSession() as session:
            used = {}
            for name in self.workers():
                url = self.servers[name].url
                async with session.post(f"{url}/flush_cache?timeout=10") as response:
                    assert response.status == 200, f"{name}: {await response.text()}"
                loads = (await _get(session, f"{url}/v1/loads"))["loads"]
                used[name] = sum(load["num_used_tokens"] for load in loads)
        return used

    async def reports(self) -> dict[str, list[dict[str, Any]]]:
        """The reports of the pools of each server."""
        async with aiohttp.ClientSession() as session:
            pages = {name: await _get(session, f"{one.url}/mempool") for name, one in self.servers.items()}
        return {name: page if isinstance(page, list) else page["pools"] for name, page in pages.items()}

    def log_lines(self, pattern: str) -> list[str]:
        """The logs of all servers, also ended ones."""
        found = re.compile(pattern)
        return [
            f"{path.name}: {line}"
            for path in sorted(self._directory.glob("*.log"))
            for line in path.read_text(errors="replace").splitlines()
            if found.search(line)
        ]

    async def _held(self, session: aiohttp.ClientSession) -> list[str]:
        try:
            workers = (await _get(session, f"{self.url}/workers"))["workers"]
            held = [f"{one['instance_id']} runs {one['running']}" for one in workers if one["running"]]
            for name in self.workers():
                loads = (await _get(session, f"{self.servers[name].url}/v1/loads"))["loads"]
                count = sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)
                held += [f"{name} has {count} requests"] if count else []
            for name, reports in (await self.reports()).items():
                for report in reports:
                    counts = {what: report["pool"][what] for what in HELD if report["pool"][what]}
                    held += [f"{name}'s pool holds {counts}"] if counts else []
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return [f"cannot be known: {error!r}"]
        return held

    async def __aenter__(self) -> RealWorld:
        try:
            await self.router.start()
            self._stack.push_async_callback(self.router.kill)
            for number in range(2):
                for role in (Role.PREFILL, Role.DECODE):
                    self._add(f"{role}-{number}", role)
            self._add("memory", Role.MEMORY)
            for server in self.servers.values():
                await server.start()
                self._stack.push_async_callback(server.close)
            await asyncio.gather(*(server.ready() for server in self.servers.values()))
            await self._whole()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def _add(self, name: str, role: Role) -> None:
        flags = ["--dram-gib", str(DRAM_GIB)]
        if role is not Role.MEMORY:
            flags += ["--model-path", str(self._model), "--max-total-tokens", str(HBM_TOKENS)]
        self.servers[name] = Server(name, role, self.router.control, self._directory, flags)

    async def _whole(self) -> None:
        """All servers and their pools are ready."""
        async with aiohttp.ClientSession() as session, asyncio.timeout(60):
            while True:
                page = await _get(session, f"{self.url}/workers")
                ready = [one for one in page["workers"] if one["state"] == "ready"]
                if len(ready) == len(self.workers()) and len(page["pools"]) >= len(self.servers):
                    return
                await asyncio.sleep(0.1)


def free_port() -> int:
    """A free port that stays free while its server is down: the system assigns higher ports."""
    while True:
        port = random.randint(10_000, 32_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


def _client(address: str) -> ControlLink:
    return ControlClient(address)


async def _get(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url, timeout=aiohttp.ClientTimeout(total=10)) as response:
        return json.loads(await response.read())


def _stat(path: Path) -> list[str]:
    try:
        return path.read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _arenas(pid: int) -> list[Path]:
    """The memory of the pools of a process, as files."""
    found = []
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            if "memserve-arena" in os.readlink(link):
                found.append(link)
        except OSError:
            continue
    return found


def _spoil(arena: Path) -> None:
    with arena.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        view = bytearray(memory[::64])
        memory[::64] = bytes(byte ^ 0xFF for byte in view)
