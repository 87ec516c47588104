"""Changes an instance's role while the cluster serves: drain, restart at the same address, register.

    drain, evacuate ──> the next heartbeat's answer names the role ──> the instance exits and restarts
                                          in that role at the same address ──> registers ──> ready

A process has one disaggregation mode in SGLang, so another role needs another process. The drain has sent
its DRAM blocks to other instances by then. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from memserve.router.cluster.drain import LOOK_S, DrainManager, DrainStatus
from memserve.router.cluster.instance import ClusterSnapshot
from memserve.router.cluster.member import Member, State
from memserve.router.cluster.registry import InstanceRegistry
from memserve.wire.messages import Role

logger = logging.getLogger(__name__)


class Phase(StrEnum):
    """The progress of a role change."""

    DRAINING = "draining"
    RESTARTING = "restarting"
    DONE = "done"
    FAILED = "failed"
    """The drain timed out, and the instance serves in its old role; or it did not come back."""


@dataclass(slots=True)
class RoleChange:
    """One role change. Changed by `RoleChanges` only."""

    url: str
    role: Role
    phase: Phase = Phase.DRAINING
    drained: DrainStatus | None = None
    reason: str = ""
    """Why it failed."""

    @property
    def is_over(self) -> bool:
        return self.phase in (Phase.DONE, Phase.FAILED)


class RoleChanges:
    """The running role changes, and the last one at each address. Event loop thread only."""

    def __init__(
        self, cluster: InstanceRegistry, drains: DrainManager, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster = cluster
        self._drains = drains
        self._clock = clock
        self._changes: dict[str, RoleChange] = {}
        self._running: dict[str, asyncio.Task[None]] = {}

    def rejection_reason(self, member: Member, role: Role, *, is_forced: bool) -> str | None:
        """Why `member` cannot change to `role` now; None if it can."""
        info = member.info
        if member.is_static:
            return (
                "a server named by URL keeps the role it was started in "
                "(SGLang's --disaggregation-mode): restart it, and add it again"
            )
        if role not in info.roles:
            able = ", ".join(info.roles) or "nothing else"
            return f"it can become {able}: with the flags it was started with it has no choice"
        change = self._changes.get(info.url)
        if change is not None and not change.is_over:
            return f"it is becoming {change.role} already"
        if not is_forced and (reason := self._gap_without(member)):
            return f'without it {reason}; {{"force": true}} does it all the same'
        return None

    def begin(self, member: Member, role: Role, timeout_s: float) -> RoleChange:
        """Start to change `member` to `role`; `rejection_reason` was None.

        `timeout_s` limits the drain, and then the restart.
        """
        change = self._changes[member.info.url] = RoleChange(member.info.url, role)
        logger.info("instance changes its role instance=%s to=%s", member.info.instance_id, role)
        task = asyncio.create_task(self._run(member, change, timeout_s))
        self._running[change.url] = task
        task.add_done_callback(lambda _: self._running.pop(change.url))
        return change

    def change_of(self, url: str) -> RoleChange | None:
        """The last change at that URL."""
        return self._changes.get(url)

    async def wait(self, change: RoleChange) -> None:
        """Return when `change` is over."""
        task = self._running.get(change.url)
        if task is not None:
            await asyncio.shield(task)

    def close(self) -> None:
        """Cancel all changes."""
        for task in self._running.values():
            task.cancel()

    async def _run(self, member: Member, change: RoleChange, timeout_s: float) -> None:
        self._drains.begin(member)
        change.drained = await self._drains.wait(member, timeout_s)
        if not change.drained.is_done:
            self._fail(change, "its requests have not ended in time")
            self._drains.end(member)
            return
        change.phase = Phase.RESTARTING
        member.new_role = change.role
        until_s = self._clock() + timeout_s
        while (
            (now := self._cluster.find(change.url)) is None or now is member or now.state is not State.READY
        ):
            if self._clock() >= until_s:
                self._fail(change, "it has not come back in time")
                member.new_role = None
                if now is member:
                    self._drains.end(member)
                return
            await asyncio.sleep(LOOK_S)
        if now.info.role is change.role:
            change.phase = Phase.DONE
            logger.info(
                "instance has changed its role instance=%s role=%s", now.info.instance_id, change.role
            )
        else:
            self._fail(change, f"it has come back as {now.info.role}")

    def _fail(self, change: RoleChange, reason: str) -> None:
        logger.warning("instance keeps its role url=%s wanted=%s: %s", change.url, change.role, reason)
        change.phase, change.reason = Phase.FAILED, reason

    def _gap_without(self, member: Member) -> str | None:
        """Why its model could not be served without `member`; None if it could, or cannot be now."""
        if member.server_info is None:
            return None
        ready = self._cluster.snapshot.serving(member.server_info.model)
        others = ClusterSnapshot.of(one for one in ready.all() if one.instance_id != member.info.instance_id)
        return None if ready.unavailable_reason() else others.unavailable_reason()
