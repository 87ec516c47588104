"""An instance becomes another role's while the cluster serves: drained, started anew in its place, back.

    drain, evacuate ──> told with its next heartbeat ──> it ends, and starts in the other role
                                                          at the same address ──> registers ──> ready

SGLang's disaggregation mode is that of a process: nothing less than a new one has another role. What it held
in DRAM is elsewhere by then, as far as the drain could see to it. HTTP is others' business.
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
    """How far a change has come."""

    DRAINING = "draining"
    RESTARTING = "restarting"
    DONE = "done"
    FAILED = "failed"
    """It was not drained in time, and serves again in the role it had; or it has not come back."""


@dataclass(slots=True)
class RoleChange:
    """One instance's way into another role. Changed by `RoleChanges` only."""

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
    """The changes of role under way, and the last one at each address. Event loop thread only."""

    def __init__(
        self, cluster: InstanceRegistry, drains: DrainManager, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster = cluster
        self._drains = drains
        self._clock = clock
        self._changes: dict[str, RoleChange] = {}
        self._running: dict[str, asyncio.Task[None]] = {}

    def rejection_reason(self, member: Member, role: Role, *, is_forced: bool) -> str | None:
        """Why `member` cannot become a `role` now; None if it can."""
        info = member.info
        if member.is_static:
            return (
                "a server that was named by URL has no other role than the one it was started in "
                "(SGLang's --disaggregation-mode): start it anew, and name it anew"
            )
        if role not in info.roles:
            able = ", ".join(info.roles) or "nothing else"
            return f"it can become {able}: with the flags it was started with it has no choice"
        change = self._changes.get(info.url)
        if change is not None and not change.is_over:
            return f"it is becoming {change.role} already"
        if not is_forced and (reason := self._why_needed(member)):
            return f'without it {reason}; {{"force": true}} does it all the same'
        return None

    def begin(self, member: Member, role: Role, timeout_s: float) -> RoleChange:
        """Have `member`, to whom nothing stands against it, become a `role`.

        `timeout_s` for its requests to end, and as long again for it to come back.
        """
        change = self._changes[member.info.url] = RoleChange(member.info.url, role)
        logger.info("instance changes its role instance=%s to=%s", member.info.instance_id, role)
        task = asyncio.create_task(self._run(member, change, timeout_s))
        self._running[change.url] = task
        task.add_done_callback(lambda _: self._running.pop(change.url))
        return change

    def change_of(self, url: str) -> RoleChange | None:
        """The last one at that address."""
        return self._changes.get(url)

    async def wait(self, change: RoleChange) -> None:
        """Return when it is over."""
        task = self._running.get(change.url)
        if task is not None:
            await asyncio.shield(task)

    def close(self) -> None:
        """Wait for nobody any more."""
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

    def _why_needed(self, member: Member) -> str | None:
        """Why nobody could serve its model while it is away; None if others can, or nobody can as it is."""
        if member.server_info is None:
            return None
        ready = self._cluster.snapshot.serving(member.server_info.model)
        others = ClusterSnapshot.of(one for one in ready.all() if one.instance_id != member.info.instance_id)
        return None if ready.unavailable_reason() else others.unavailable_reason()
