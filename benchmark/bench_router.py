"""What the router costs: latency it adds, requests per second, delay of the first streamed byte.

    python benchmark/bench_router.py [--requests N] [--rounds N]

    this process ──┬──> router ──┬──> prefill and decode, or one colocated server
                   │             └    (lean fakes, a process each; so is the router)
                   └──> the decode or colocated server itself: the baseline

The fake servers answer at once: what is measured is the router, two hops over loopback and this
client. Router and baseline are asked in turn, round after round. On a machine with few cores the
processes also share those: throughput is a lower bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import uvloop
from aiohttp import web

from figures import progress, report
from memserve.core.ids import InstanceId
from memserve.router.config import STATIC_EPOCH, RouterConfig
from memserve.router.server import running_router
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import InstanceInfo, Role

PROMPT_BYTES = 4096
NUM_CONNECTIONS = 32
EVENT_GAP_S = 0.005
"""The streams of the delay figure pause so long between events: each is relayed on its own."""
NUM_EVENTS = 5
START_TIMEOUT_S = 20.0

ANSWER = {
    "text": "x" * 64,
    "meta_info": {"id": "x", "finish_reason": {"type": "length"}, "prompt_tokens": 1024, "cached_tokens": 0},
}


class LeanWorker(FakeWorker):
    """A fake worker that keeps no record; its streams tell when each event was written."""

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if b'"stream":true' not in body:
            return web.json_response(ANSWER)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(NUM_EVENTS):
            await asyncio.sleep(EVENT_GAP_S)
            await response.write(b'data: {"sent": %r}\n\n' % time.monotonic())
        await response.write(b"data: [DONE]\n\n")
        return response


class Client:
    """One kept-alive connection that does as little as it can: it must not be the cost."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Client:
        """Connect to a server on this machine."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, request: bytes) -> None:
        """Send a request and read its whole answer."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode())
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await self._reader.readexactly(int(length))

    async def event_delays_s(self, request: bytes) -> list[float]:
        """Send a streaming request; for each event the seconds since the worker wrote it."""
        self._writer.write(request)
        await self._reader.readuntil(b"\r\n\r\n")
        delays: list[float] = []
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            chunk = await self._reader.readexactly(size + 2)
            now = time.monotonic()
            events = chunk.split(b"\n\n")
            delays += [now - json.loads(event[6:])["sent"] for event in events if b"sent" in event]
        await self._reader.readexactly(2)
        return delays

    def close(self) -> None:
        """Drop the connection."""
        self._writer.close()


@dataclass(frozen=True)
class Setting:
    """A router, and a server behind it that can be asked directly."""

    name: str
    router_port: int
    direct_port: int


def request_bytes(*, stream: bool = False) -> bytes:
    """A /generate request as it goes over the wire, fit for each role."""
    body = {"text": "x" * PROMPT_BYTES, "sampling_params": {"max_new_tokens": 16}, "stream": stream}
    data = json.dumps(body, separators=(",", ":")).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: h\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def latencies_s(port: int, count: int) -> list[float]:
    """How long each of `count` requests took on one connection."""
    client, request = await Client.open(port), request_bytes()
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        await client.ask(request)
        taken.append(time.perf_counter() - start)
    client.close()
    return taken


async def requests_per_s(port: int, count: int) -> float:
    """The rate at which `count` requests were answered on all connections together."""
    request = request_bytes()
    clients = [await Client.open(port) for _ in range(NUM_CONNECTIONS)]

    async def work(client: Client) -> None:
        for _ in range(count // NUM_CONNECTIONS):
            await client.ask(request)

    start = time.perf_counter()
    await asyncio.gather(*(work(client) for client in clients))
    elapsed_s = time.perf_counter() - start
    for client in clients:
        client.close()
    return count // NUM_CONNECTIONS * NUM_CONNECTIONS / elapsed_s


async def stream_delays_s(port: int, count: int) -> list[float]:
    """The first event's delay in each of `count` streams, all on one connection."""
    client, request = await Client.open(port), request_bytes(stream=True)
    delays = [(await client.event_delays_s(request))[0] for _ in range(count)]
    client.close()
    return delays


async def in_turn(
    measure: Callable[[int], Awaitable[float]], setting: Setting, rounds: int
) -> tuple[list[float], list[float]]:
    """`measure` of the router and of the baseline, round after round; the first does not count."""
    router, direct = [], []
    for _ in range(rounds + 1):
        direct.append(await measure(setting.direct_port))
        router.append(await measure(setting.router_port))
    return router[1:], direct[1:]


async def run(setting: Setting, num_requests: int, rounds: int) -> None:
    """Print every figure of one setting."""

    async def p50_us(port: int) -> float:
        return statistics.median(await latencies_s(port, num_requests)) * 1e6

    async def rate(port: int) -> float:
        return await requests_per_s(port, 2 * num_requests)

    async def delay_us(port: int) -> float:
        return statistics.median(await stream_delays_s(port, 30)) * 1e6

    async def worst_delay_us(port: int) -> float:
        return max(await stream_delays_s(port, 30)) * 1e6

    name = f"router_{setting.name}"
    progress(f"{setting.name}: latency, one connection, {PROMPT_BYTES} byte prompts")
    router, direct = await in_turn(p50_us, setting, rounds)
    report(f"{name}_p50", router, "us", baseline=direct)
    report(f"{name}_added_p50", [one - other for one, other in zip(router, direct, strict=True)], "us")
    progress(f"{setting.name}: requests/s, {NUM_CONNECTIONS} connections")
    router, direct = await in_turn(rate, setting, rounds)
    report(f"{name}_rate", router, "requests/s", baseline=direct)
    progress(f"{setting.name}: first streamed byte, kept-alive connection")
    router, direct = await in_turn(delay_us, setting, rounds)
    report(f"{name}_first_byte_p50", router, "us", baseline=direct)
    router, direct = await in_turn(worst_delay_us, setting, rounds)
    report(f"{name}_first_byte_worst_of_30", router, "us", baseline=direct)


def serve_worker(role: Role, ready: Connection) -> None:
    """A process: one lean worker."""

    async def main() -> None:
        async with LeanWorker(role) as worker:
            ready.send(worker.port)
            await asyncio.Event().wait()

    uvloop.run(main())


def serve_router(static: tuple[InstanceInfo, ...], ready: Connection) -> None:
    """A process: one router over the servers in `static`."""

    async def main() -> None:
        async with running_router(RouterConfig(port=0, static=static)) as router:
            ready.send(int(router.url.rsplit(":", 1)[1]))
            await asyncio.Event().wait()

    uvloop.run(main())


@contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[int]:
    """`target` in a process of its own; the port it serves on."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(*arguments, theirs), daemon=True)
    child.start()
    try:
        if not ours.poll(START_TIMEOUT_S):
            raise TimeoutError(f"{target.__name__} did not start")
        yield ours.recv()
    finally:
        child.terminate()
        child.join()


@contextmanager
def staged(name: str, roles: Sequence[Role]) -> Iterator[Setting]:
    """A router over one fake server per role; the last one is the baseline."""
    with ExitStack() as stack:
        ports = [stack.enter_context(process(serve_worker, role)) for role in roles]
        static = tuple(
            InstanceInfo(InstanceId(role), STATIC_EPOCH, role, f"http://127.0.0.1:{port}", 8998)
            for role, port in zip(roles, ports, strict=True)
        )
        router_port = stack.enter_context(process(serve_router, static))
        wait_until_ready(router_port)
        yield Setting(name, router_port, ports[-1])


def wait_until_ready(port: int) -> None:
    """Until a router has found its servers."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readiness", timeout=5).close()
        except urllib.error.HTTPError:
            threading.Event().wait(0.05)
        else:
            return
    raise TimeoutError("the router found no servers")


def main() -> None:
    """Measure in front of a pair, then in front of a colocated server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1000, help="requests per round (default: 1000)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: 7)")
    args = parser.parse_args()
    for name, roles in (("pair", (Role.PREFILL, Role.DECODE)), ("colocated", (Role.COLOCATED,))):
        with staged(name, roles) as setting:
            uvloop.run(run(setting, args.requests, args.rounds))


if __name__ == "__main__":
    main()
