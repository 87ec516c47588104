"""A router process in front of processes with fake workers, and the links between them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType

import aiohttp

from memserve.testing.faulty_link import Faults, FaultyLink, FaultyProxy
from memserve.testing.transport_process import ChildProcess
from memserve.wire.link import ControlClient
from memserve.wire.messages import Heartbeat, Register

from .router_process import RouterProcess
from .tcp_link import TcpLink

HOST = Path(__file__).parent / "fake_host.py"
NUM_HOSTS = 4
NUM_WORKERS = 4
"""Workers of each host; half of them are prefills."""
SETTLE_S = 5.0
FLAGS = (
    *("--heartbeat-secs", "0.3", "--request-timeout-secs", "3", "--shutdown-grace-period-secs", "0.3"),
    *("--cb-timeout-secs", "0.3", "--policy", "round_robin"),
)
"""Round robin reaches every worker soon; real servers use the default policy."""


class FakeHost:
    """One process with fake workers, which keep their ports over a restart."""

    def __init__(self, number: int, model: Path, control: str) -> None:
        self.name = f"host{number}"
        self.faults = Faults()
        self._model = model
        self._proxy = FaultyProxy(FaultyLink(ControlClient(control), self.faults))
        self._ports = ["0"] * NUM_WORKERS
        self.links: list[TcpLink] = []
        self.workers: frozenset[str] = frozenset()

    async def start(self) -> None:
        """Return when its workers listen; they register soon after."""
        arguments = (str(HOST), self.name, str(self._model), self._proxy.address, ",".join(self._ports))
        self._process = await asyncio.to_thread(ChildProcess, *arguments)
        greeting: dict[str, int] = self._process.greeting
        self.workers = frozenset(greeting)
        shown = [f":{link.port}" for link in self.links] or [""] * NUM_WORKERS
        self._ports = [f"{port}{after}" for port, after in zip(greeting.values(), shown, strict=True)]
        for link, port in zip(self.links, greeting.values(), strict=False):
            link.lead_to(port)

    async def link_up(self) -> None:
        """Put links of the test between the router and its workers. Call before `start`."""
        for _ in range(NUM_WORKERS):
            self.links.append(TcpLink())
            await self.links[-1].open()
        self._ports = [f"0:{link.port}" for link in self.links]

    async def kill(self) -> None:
        """SIGKILL."""
        await asyncio.to_thread(self._process.kill)

    async def freeze(self) -> None:
        """SIGSTOP."""
        await asyncio.to_thread(self._process.stop)

    async def thaw(self) -> None:
        """SIGCONT."""
        self._process.resume()

    async def behave(self, how: str) -> None:
        """Set the misbehaviour of its workers from now on."""
        await asyncio.to_thread(self._process.ask, "behave", how=how)

    async def num_open(self) -> int:
        """Requests that its workers have not ended."""
        count: int = await asyncio.to_thread(self._process.ask, "num_open")
        return count

    def lose_messages(self, share: float) -> None:
        """The faults of its control messages and their answers."""
        self.faults.lose(share, Heartbeat, Register)

    async def link(self, how: str) -> None:
        """Set the state of the links to its workers."""
        for link in self.links:
            link.behave(how)

    async def close(self) -> None:
        """Stop it for good."""
        await self.kill()
        for link in self.links:
            await link.close()
        await asyncio.to_thread(self._proxy.close)


class FakeWorld:
    """See the module. A context manager."""

    name = "fakes"

    def __init__(self, directory: Path, model: Path) -> None:
        self._model = model
        self.router = RouterProcess(directory, FLAGS)
        self.hosts: list[FakeHost] = []
        self._stack = AsyncExitStack()

    @property
    def url(self) -> str:
        return self.router.url

    def workers(self) -> frozenset[str]:
        """All workers."""
        return frozenset[str]().union(*(host.workers for host in self.hosts))

    async def leaks(self) -> list[str]:
        """Requests that the router or a worker still holds."""
        held: list[str] = []
        async with aiohttp.ClientSession() as session:
            for _ in range(int(SETTLE_S / 0.05)):
                held = await self._held(session)
                if not held:
                    return []
                await asyncio.sleep(0.05)
        return held

    async def _held(self, session: aiohttp.ClientSession) -> list[str]:
        async with session.get(f"{self.url}/workers") as response:
            workers = (await response.json())["workers"]
        held = [f"{one['instance_id']} runs {one['running']}" for one in workers if one["running"]]
        counts = await asyncio.gather(*(host.num_open() for host in self.hosts))
        return held + [f"{h.name} has {n} open" for h, n in zip(self.hosts, counts, strict=True) if n]

    async def _all_ready(self) -> None:
        async with aiohttp.ClientSession() as session, asyncio.timeout(20):
            while True:
                async with session.get(f"{self.url}/readiness") as response:
                    page = await response.json()
                if page["prefill"] + page["decode"] == NUM_HOSTS * NUM_WORKERS:
                    return
                await asyncio.sleep(0.05)

    async def __aenter__(self) -> FakeWorld:
        try:
            await self.router.start()
            self._stack.push_async_callback(self.router.kill)
            self.hosts = [FakeHost(n, self._model, self.router.control) for n in range(NUM_HOSTS)]
            await self.hosts[-1].link_up()
            for host in self.hosts:
                self._stack.push_async_callback(host.close)
            await asyncio.gather(*(host.start() for host in self.hosts))
            await self._all_ready()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
