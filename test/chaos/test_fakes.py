"""Many fake workers and one real router: under any fault, every request ends right or with a clear error."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from memserve.testing.faulty_link import Fault as LinkFault
from memserve.wire.messages import Heartbeat

from .answers import Manner, answer_of
from .fake_world import FakeHost, FakeWorld
from .faults import Fault, Pace, bout
from .ledger import Row, json_lines, table
from .requests import Ask, conversations

PACE = Pace(num_clients=12, warm_s=0.2, recover_s=8.0, limit_s=10.0)
NUM_TOKENS = 24


def faults(world: FakeWorld) -> list[Fault]:
    """The faults, in order."""
    one, two, three, linked = world.hosts
    router = world.router
    day_s = 86400
    return [
        Fault("none", "-"),
        Fault("kill -9, same address again", one.name, one.kill, one.start),
        Fault("SIGSTOP, SIGCONT", two.name, two.freeze, two.thaw, hold_s=1.0),
        *(
            Fault(f"answers: {how}", three.name, partial(three.behave, how), partial(three.behave, "well"))
            for how in ("500", "resets", "half", "garbage", "never", "closes")
        ),
        *(
            Fault(f"link: {how}", linked.name, partial(linked.link, how), partial(linked.link, "well"))
            for how in ("cut", "slow", "silent")
        ),
        Fault("control link cut", two.name, partial(_lose, two, 1.0), partial(_clear, two), hold_s=2.0),
        Fault("control messages lost", two.name, partial(_lose, two, 0.4), partial(_clear, two), hold_s=1.0),
        Fault(
            "control messages doubled",
            one.name,
            partial(_expect, one, LinkFault.DOUBLE),
            partial(_clear, one),
        ),
        Fault("control messages late", one.name, partial(_expect, one, LinkFault.DELAY), partial(_land, one)),
        Fault("router SIGKILL, restart", "router", router.kill, router.start, router_dies=True),
        Fault("router SIGTERM, restart", "router", router.stop, router.start, router_dies=True),
        Fault("router SIGSTOP, SIGCONT", "router", router.freeze, router.thaw),
        Fault("disk full for logs", "router", router.fill_disk, router.free_disk),
        Fault(
            "clock a day ahead",
            "router",
            partial(_clock, router.clock, day_s),
            partial(_clock, router.clock, 0),
        ),
        Fault(
            "clock a day behind",
            "router",
            partial(_clock, router.clock, -day_s),
            partial(_clock, router.clock, 0),
        ),
        Fault("clients are slow", "clients", odd=Manner(PACE.limit_s, pause_s=0.1)),
        Fault("clients leave", "clients", odd=Manner(PACE.limit_s, leaves_after=3), hold_s=1.0),
    ]


@pytest.mark.timeout(180)
def test_no_request_is_lost_and_nothing_leaks_under_any_fault(tmp_path: Path, tiny_model: Path) -> None:
    rows, tracebacks = asyncio.run(_run(tmp_path, tiny_model))
    print(f"\n{table(rows)}\n{json_lines(rows)}")
    assert [row for row in rows if not row.is_good] == []
    assert rows[0].right == rows[0].sent > 0, "nothing was wrong"
    assert all(row.right for row in rows)
    assert tracebacks == []


async def _run(directory: Path, model: Path) -> tuple[list[Row], list[str]]:
    rows = []
    async with FakeWorld(directory, model) as world:
        async with aiohttp.ClientSession() as session:

            async def undisturbed(ask: Ask) -> tuple[str, ...]:
                return await answer_of(session, world.url, ask)

            asks = await conversations(undisturbed, num_chats=12, num_turns=3, num_tokens=NUM_TOKENS)
        for seed, fault in enumerate(faults(world)):
            rows.append(await bout(world, asks, PACE, fault, seed))
        return rows, world.router.tracebacks()


async def _lose(host: FakeHost, share: float) -> None:
    host.lose_messages(share)


async def _clear(host: FakeHost) -> None:
    host.faults.clear()


async def _expect(host: FakeHost, fault: LinkFault) -> None:
    host.faults.expect(Heartbeat, *[fault] * 20)


async def _land(host: FakeHost) -> None:
    """Delayed messages arrive now, after later ones."""
    host.faults.clear()
    await asyncio.to_thread(host.faults.land)


async def _clock(file: Path, ahead_s: float) -> None:
    file.write_text(str(ahead_s))  # noqa: ASYNC240
