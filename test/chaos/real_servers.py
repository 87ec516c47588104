"""Real SGLang servers and a real router: under any fault, every request ends right or with a clear error.

Takes minutes, so it runs by name only: `make chaos`, or `make chaos FAULTS='SIGSTOP|link'` for some.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from memserve.testing.faulty_link import Fault as LinkFault
from memserve.testing.faulty_link import Faults
from memserve.wire.messages import Heartbeat, PoolEvents, PoolHeartbeat, Register, RegisterPool, SnapshotPart
from memserve.wire.peer_messages import AcquireLease, Commit, Fetch, ReleaseLease, Reserve

from .answers import Manner, answer_of
from .faults import Fault, Pace, bout
from .ledger import Row, json_lines, table
from .real_world import RealWorld
from .requests import Ask, conversations
from .tcp_link import TcpLink

PACE = Pace(num_clients=6, warm_s=1.5, recover_s=30.0, limit_s=60.0, cold_share=0.3)
Step = Callable[[], Awaitable[object]]

TO_ROUTER = (Heartbeat, Register, PoolHeartbeat, RegisterPool, PoolEvents, SnapshotPart)
TO_POOL = (Reserve, Commit, AcquireLease, ReleaseLease, Fetch)


def faults(world: RealWorld) -> list[Fault]:
    """The faults, in order."""
    router = world.router
    prefill, decode = world.servers["prefill-0"], world.servers["decode-0"]
    other_prefill, other_decode = world.servers["prefill-1"], world.servers["decode-1"]
    memory = world.servers["memory"]
    clock = router.clock
    return [
        Fault("none", "-", hold_s=3.0),
        Fault("clients are slow", "clients", odd=Manner(PACE.limit_s, pause_s=0.2), hold_s=3.0),
        Fault("clients leave", "clients", odd=Manner(PACE.limit_s, leaves_after=3), hold_s=3.0),
        Fault("kill -9, same address again", prefill.name, prefill.kill, prefill.restart, hold_s=1.0),
        Fault("kill -9, same address again", decode.name, decode.kill, decode.restart, hold_s=1.0),
        Fault("kill -9, same address again", memory.name, memory.kill, memory.restart, hold_s=1.0),
        Fault("SIGSTOP, SIGCONT", other_prefill.name, other_prefill.freeze, other_prefill.thaw, hold_s=20.0),
        Fault("SIGSTOP, SIGCONT", other_decode.name, other_decode.freeze, other_decode.thaw, hold_s=20.0),
        Fault("router SIGKILL, restart", "router", router.kill, router.start, router_dies=True),
        Fault("router SIGTERM, restart", "router", router.stop, router.start, router_dies=True),
        Fault("router SIGSTOP, SIGCONT", "router", router.freeze, router.thaw, hold_s=3.0),
        *(
            Fault(
                f"link: {how}",
                server.name,
                partial(link, server.link, how),
                partial(link, server.link, "well"),
                hold_s=2.0,
            )
            for how, server in (("cut", decode), ("slow", prefill), ("silent", other_decode))
        ),
        Fault("control link cut", prefill.name, *lossy(prefill.faults, 1.0, TO_ROUTER), hold_s=7.0),
        Fault("control messages lost", decode.name, *lossy(decode.faults, 0.4, TO_ROUTER), hold_s=4.0),
        Fault(
            "control messages doubled",
            prefill.name,
            *each(prefill.faults, LinkFault.DOUBLE, TO_ROUTER),
            hold_s=3.0,
        ),
        Fault(
            "control messages late", decode.name, *each(decode.faults, LinkFault.DELAY, TO_ROUTER), hold_s=3.0
        ),
        Fault("pool messages lost", prefill.name, *lossy(prefill.pool_faults, 0.4, TO_POOL), hold_s=4.0),
        Fault(
            "pool messages doubled",
            other_prefill.name,
            *each(other_prefill.pool_faults, LinkFault.DOUBLE, TO_POOL),
            hold_s=3.0,
        ),
        Fault(
            "pool messages late", memory.name, *each(memory.pool_faults, LinkFault.DELAY, TO_POOL), hold_s=3.0
        ),
        Fault("KV in DRAM spoilt", prefill.name, prefill.spoil, hold_s=3.0),
        Fault("KV in DRAM spoilt", memory.name, memory.spoil, hold_s=3.0),
        Fault("disk full for logs", "router", router.fill_disk, router.free_disk, hold_s=2.0),
        Fault("disk full for logs", prefill.name, prefill.fill_disk, prefill.free_disk, hold_s=2.0),
        Fault(
            "clock a day ahead", "router", partial(step, clock, 86400), partial(step, clock, 0), hold_s=2.0
        ),
        Fault(
            "clock a day behind", "router", partial(step, clock, -86400), partial(step, clock, 0), hold_s=2.0
        ),
    ]


@pytest.mark.timeout(1500)
async def test_no_request_is_lost_and_no_block_leaks_under_any_fault(
    tmp_path: Path, tiny_model: Path
) -> None:
    await _run(tmp_path, tiny_model)


async def _run(directory: Path, model: Path) -> None:
    rows: list[Row] = []
    async with RealWorld(directory, model) as world:
        async with aiohttp.ClientSession() as session:

            async def undisturbed(ask: Ask) -> tuple[str, ...]:
                return await answer_of(session, world.url, ask)

            asks = await conversations(undisturbed, num_chats=12, num_turns=4, num_tokens=24)
        wanted = os.environ.get("FAULTS", "")
        for seed, fault in enumerate(
            one for one in faults(world) if re.search(wanted, f"{one.kind} {one.target}")
        ):
            rows.append(await bout(world, asks, PACE, fault, seed))
            print(json_lines(rows[-1:]), flush=True)
        print(f"\n{table(rows)}")
        spoilt = {
            name: [one["pool"]["corruptions"] for one in them]
            for name, them in (await world.reports()).items()
        }
        print("blocks found spoilt:", spoilt)
        assert [row for row in rows if not row.is_good] == []
        assert all(row.right for row in rows)
        assert [row for row in rows if row.kind == "none" and row.right < row.sent] == []
        assert set((await world.unused_tokens()).values()) == {0}
        assert world.log_lines("Traceback|leak detected") == []


async def link(one: TcpLink, how: str) -> None:
    """Set the state of a link."""
    one.behave(how)


async def step(file: Path, ahead_s: float) -> None:
    """Move the router's wall clock."""
    file.write_text(str(ahead_s))  # noqa: ASYNC240


def lossy(faults: Faults, share: float, kinds: tuple[type, ...]) -> tuple[Step, Step]:
    """Lose a share of messages and of answers; end it."""

    async def begin() -> None:
        faults.lose(share, *kinds)

    return begin, partial(_end, faults)


def each(faults: Faults, fault: LinkFault, kinds: tuple[type, ...]) -> tuple[Step, Step]:
    """Give the next messages of each type a fault; end it. Delayed messages arrive then."""

    async def begin() -> None:
        for kind in kinds:
            faults.expect(kind, *[fault] * 30)

    return begin, partial(_end, faults)


async def _end(faults: Faults) -> None:
    faults.clear()
    await asyncio.to_thread(faults.land)
