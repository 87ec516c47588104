"""Drains instances: no new requests, KV blocks sent to other instances, running requests finished.

    drain ──> no new requests ──> evacuate ──> its last request ends ──> evacuate the new blocks ──> done

An evacuation that fails, or runs out of time, costs recomputation and nothing else. Each rank's pool sends
to pools of the same layout. Knows no HTTP and no permissions.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import MemServeError
from memserve.core.ids import Epoch, InstanceId, server_of
from memserve.router.cluster.member import Member
from memserve.router.cluster.pools import Pools
from memserve.router.cluster.registry import InstanceRegistry
from memserve.wire.async_link import AsyncControlClient
from memserve.wire.messages import PoolInfo, Role
from memserve.wire.peer_messages import Evacuate, Evacuated, EvacuationTarget

logger = logging.getLogger(__name__)

LOOK_S = 0.02
"""Poll period of a drain."""
USES_DRAM = frozenset((Role.PREFILL, Role.COLOCATED, Role.MEMORY))
"""Roles that reuse blocks in their DRAM. SGLang's decode never loads from there."""


@dataclass(frozen=True, slots=True)
class EvacuationResult:
    """The outcome of an evacuation, all ranks of the instance together."""

    num_blocks: int = 0
    num_bytes: int = 0
    num_known: int = 0
    """Blocks that other instances had already."""
    num_left: int = 0
    seconds: float = 0.0
    reason: str = ""
    """Why blocks were left."""

    def then(self, later: EvacuationResult) -> EvacuationResult:
        """This evacuation followed by `later`, whose totals are the newer ones."""
        return EvacuationResult(
            self.num_blocks + later.num_blocks,
            self.num_bytes + later.num_bytes,
            max(0, later.num_known - self.num_blocks),
            later.num_left,
            self.seconds + later.seconds,
            later.reason,
        )


@dataclass(frozen=True, slots=True)
class DrainStatus:
    """The progress of a drain."""

    num_running: int
    evacuation: EvacuationResult | None
    """None: still running, or there is nothing to evacuate."""
    is_done: bool


class DrainManager:
    """All running drains. Event loop thread only."""

    def __init__(
        self,
        cluster: InstanceRegistry,
        pools: Pools,
        num_running: Callable[[InstanceId], int],
        *,
        key: ClusterKey | None,
        evacuate_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`evacuate_s`: time limit of an evacuation; 0: do not evacuate."""
        self._cluster = cluster
        self._pools = pools
        self._num_running = num_running
        self._client = AsyncControlClient(key=key)
        self._evacuate_s = evacuate_s
        self._clock = clock
        self._leaving: dict[tuple[InstanceId, Epoch], asyncio.Task[EvacuationResult | None]] = {}

    def begin(self, member: Member) -> None:
        """Start to drain `member`, one of the cluster's. Idempotent."""
        self._cluster.drain(member)
        process = _process(member)
        if process not in self._leaving:
            self._leaving[process] = asyncio.create_task(self._leave(member))

    async def wait(self, member: Member, timeout_s: float) -> DrainStatus:
        """The status when the drain is done or was ended, or when the time is over."""
        until_s = self._clock() + timeout_s
        while not (drained := self.status(member)).is_done and self._goes_on(member):
            if (left_s := until_s - self._clock()) <= 0:
                break
            await asyncio.sleep(min(LOOK_S, left_s))
        return drained

    def status(self, member: Member) -> DrainStatus:
        """The current status."""
        running = self._num_running(member.info.instance_id)
        leaving = self._leaving.get(_process(member))
        is_evacuated = leaving is not None and leaving.done() and not leaving.cancelled()
        evacuation = leaving.result() if leaving is not None and is_evacuated else None
        return DrainStatus(running, evacuation, member.is_draining and is_evacuated and not running)

    async def empty(self, memory: InstanceId) -> DrainStatus:
        """Evacuate a memory instance. It has no requests; pools may go on storing there."""
        evacuation = await self._evacuate(memory) if self._evacuate_s else None
        return DrainStatus(0, evacuation, True)

    def end(self, member: Member) -> None:
        """End the drain: `member` gets requests again. Idempotent."""
        self._cluster.undrain(member)
        leaving = self._leaving.pop(_process(member), None)
        if leaving is not None:
            leaving.cancel()

    def retain(self) -> None:
        """Drop the drains of processes that have left, and the connections to them."""
        there = {_process(member) for member in self._cluster.members()}
        for gone in self._leaving.keys() - there:
            self._leaving.pop(gone).cancel()
        self._client.keep({info.address for info in self._pools.infos()})

    def close(self) -> None:
        """Cancel all drains."""
        for leaving in self._leaving.values():
            leaving.cancel()
        self._client.close()

    def _goes_on(self, member: Member) -> bool:
        return member.is_draining and self._cluster.find(member.info.instance_id) is member

    async def _leave(self, member: Member) -> EvacuationResult | None:
        """Evacuate `member` while its requests end; None if there is nothing to evacuate."""
        name = member.info.instance_id
        if not self._evacuate_s or not self._pools.of(name):
            return None
        was_busy = self._num_running(name) > 0
        evacuation = await self._evacuate(name)
        if was_busy:
            while self._num_running(name) and self._goes_on(member):  # noqa: ASYNC110 no event tells
                await asyncio.sleep(LOOK_S)
            evacuation = evacuation.then(await self._evacuate(name))
        logger.info(
            "instance evacuated instance=%s blocks=%d known=%d left=%d seconds=%.2f reason=%s",
            *(name, evacuation.num_blocks, evacuation.num_known, evacuation.num_left),
            *(evacuation.seconds, evacuation.reason or "none"),
        )
        return evacuation

    async def _evacuate(self, name: InstanceId) -> EvacuationResult:
        begun_s = self._clock()
        ready = {instance.instance_id for instance in self._cluster.snapshot.all()}
        infos = self._pools.infos()
        layouts = {info.layout for info in infos if info.layout}
        asked = [
            self._ask(own, layout, evacuation_targets(own, layout, infos, ready))
            for own in self._pools.of(name)
            for layout in ({own.layout} if own.layout else layouts)
        ]
        answers = await asyncio.gather(*asked)
        return EvacuationResult(
            sum(answer.num_sent for answer in answers),
            sum(answer.num_bytes for answer in answers),
            sum(answer.num_known for answer in answers),
            sum(answer.num_left for answer in answers),
            self._clock() - begun_s,
            next((answer.reason for answer in answers if answer.reason), ""),
        )

    async def _ask(self, own: PoolInfo, layout: str, targets: tuple[EvacuationTarget, ...]) -> Evacuated:
        message = Evacuate(bytes.fromhex(layout), targets, self._evacuate_s)
        timeout_s = self._evacuate_s + 5.0  # The answer takes longer if a peer is slow.
        try:
            answer = await self._client.request(own.address, message, timeout_s=timeout_s)
        except MemServeError as error:
            return Evacuated(0, 0, 0, 0, str(error))
        return answer if isinstance(answer, Evacuated) else Evacuated(0, 0, 0, 0, f"{own.address} does not")


def evacuation_targets(
    own: PoolInfo, layout: str, pools: Sequence[PoolInfo], ready: set[InstanceId]
) -> tuple[EvacuationTarget, ...]:
    """The pools that can store blocks of `layout` from `own`, and reuse them. Pure.

    `ready`: the ids of the servers that are ready.
    """
    server = server_of(own.instance_id)
    return tuple(
        EvacuationTarget(info.instance_id, info.address, info.epoch)
        for info in pools
        if server_of(info.instance_id) != server
        and info.layout in (layout, "")
        and info.role in USES_DRAM
        and (info.role is Role.MEMORY or server_of(info.instance_id) in ready)
    )


def _process(member: Member) -> tuple[InstanceId, Epoch]:
    return member.info.instance_id, member.info.epoch
