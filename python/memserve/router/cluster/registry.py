"""The members of the cluster, and which of them can take requests. No I/O; the clock is passed in.

register, add_static ──> JOINING ──joined──> READY <─────────> SUSPECT     silent or stuck, and well again
                      ^                 │ ^                 │
                      │           drain v │ undrain         │
                      │               DRAINING ─────────────┴──lost_contact, silent for longer──> DOWN
                      └──joined: as before; re-register, heartbeat after silence: JOINING─────────┘
                         deregister, silent for even longer: forgotten

A suspect instance gets new requests only if no other instance serves its model in its role. A drain belongs
to a process: it lasts through lost contact, and ends with `undrain`, with the process, or when the instance
is forgotten. A restart of a static server (added by URL) cannot be noticed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Sequence

from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.config import ClusterConfig
from memserve.router.cluster.crashes import Crashes
from memserve.router.cluster.instance import ClusterSnapshot, Instance
from memserve.router.cluster.member import Member, ProcessStatus, State, SuspectReason
from memserve.router.server_info import ServerInfo
from memserve.wire.messages import InstanceInfo, Load

logger = logging.getLogger(__name__)


class InstanceRegistry:
    """The members and their states. Event loop thread only."""

    def __init__(self, config: ClusterConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self.heartbeat_s = config.heartbeat_secs
        self.probe_needed = asyncio.Event()
        """Set when a member needs a probe."""
        self.crashes = Crashes(clock)
        self.on_crashed: Callable[[str, str], None] = lambda url, reason: None
        """Called with the URL of an instance that crashed, and the reason."""
        self.on_unresponsive: Callable[[str, str], None] = lambda url, reason: None
        """Called with the URL of an instance that is down for its silence, and the reason."""
        self._clock = clock
        self._static = {info.url: info for info in config.static}
        self._members: dict[InstanceId, Member] = {}
        self._snapshot = ClusterSnapshot()
        self._up = ClusterSnapshot()
        for info in self._static.values():
            self._add(info, static=True)

    @property
    def suspect_after_s(self) -> float:
        """The silence that makes an instance suspect."""
        return self._config.suspect_heartbeats * self.heartbeat_s

    @property
    def snapshot(self) -> ClusterSnapshot:
        """The instances that get requests: ready ones, or else suspect. A new object after a change."""
        return self._snapshot

    @property
    def up(self) -> ClusterSnapshot:
        """All instances that are up, draining ones included."""
        return self._up

    def working(self) -> list[InstanceId]:
        """Instances that may have running requests: up, or draining after lost contact."""
        members = self._members.values()
        return [one.info.instance_id for one in members if one.is_up or one.is_draining]

    def find(self, name: str) -> Member | None:
        """The member with that id, or with that URL."""
        members = self.members()
        by_id = (one for one in members if one.info.instance_id == name)
        return next(by_id, None) or next((one for one in members if one.info.url == name), None)

    def members(self) -> list[Member]:
        """All members, ready or not."""
        return list(self._members.values())

    def knows(self, model: str) -> bool:
        """True if a member serves `model`, or did before it drained or lost contact."""
        return any(one.server_info is not None and one.server_info.serves(model) for one in self.members())

    def add_static(self, info: InstanceInfo) -> InstanceInfo:
        """Add a server that does not register; return it, or the static server that its URL has already."""
        known = self._static.setdefault(info.url, info)
        if known is info and self.find(info.url) is None:
            logger.info("server named role=%s url=%s", info.role, info.url)
            self._add(info, static=True)
        return known

    def static_urls(self) -> frozenset[str]:
        """The URLs of the static servers; a server may have registered there since."""
        return frozenset(self._static)

    def remove_static(self, url: str) -> None:
        """Forget the static server at `url`; an instance registered there stays. Idempotent."""
        self._static.pop(url, None)
        member = self.find(url)
        if member is not None and member.is_static:
            self._forget(member.info.instance_id, "it was removed")

    def drain(self, member: Member) -> None:
        """Send `member` no new requests; running ones may end. Idempotent."""
        if not member.is_draining:
            logger.info("instance draining instance=%s", member.info.instance_id)
        self._set_draining(member, True)

    def undrain(self, member: Member) -> None:
        """Send `member` requests again as soon as it is ready. Idempotent."""
        if member.is_draining:
            logger.info("instance drains no more instance=%s", member.info.instance_id)
        self._set_draining(member, False)

    def register(self, info: InstanceInfo, *, is_draining: bool = False) -> Member:
        """Add a server that can serve. Idempotent; replaces an old epoch, and another id at its URL.

        `is_draining`: it drains at another router; ignored for a process that is a member already.
        """
        known = self._members.get(info.instance_id)
        if known is not None and known.info == info:
            self._heard(known)
            if known.state is State.DOWN:
                known.state = State.JOINING
                self.probe_needed.set()
            return known
        for other in self.members():
            if other.info.url == info.url or other.info.instance_id == info.instance_id:
                del self._members[other.info.instance_id]
        logger.info("instance registered instance=%s role=%s url=%s", info.instance_id, info.role, info.url)
        return self._add(info, static=False, is_draining=is_draining)

    def heartbeat(self, instance_id: InstanceId, epoch: Epoch, load: Load | None = None) -> Member | None:
        """Record a heartbeat. None if no member has that epoch: the instance has to register again."""
        member = self._find(instance_id, epoch)
        if member is None:
            return None
        member.load = load
        if member.state is State.DOWN and member.suspect_reason is SuspectReason.SILENT:
            member.state = State.JOINING
            self.probe_needed.set()
        self._heard(member)
        return member

    def deregister(self, instance_id: InstanceId, epoch: Epoch, *, has_crashed: bool = False) -> None:
        """Remove the instance; running requests may end, unless it has crashed. Idempotent."""
        member = self._find(instance_id, epoch)
        if member is not None:
            if has_crashed:
                self.crashes.add(instance_id, epoch)
            self._forget(instance_id, "its scheduler crashed" if has_crashed else "it deregistered")
            if has_crashed:
                self.on_crashed(member.info.url, "its scheduler crashed")

    def joined(self, instance_id: InstanceId, epoch: Epoch, server_info: ServerInfo) -> None:
        """Record a successful probe. Ignored if the process was replaced since."""
        member = self._find(instance_id, epoch)
        if member is None:
            return
        if member.is_static and member.suspect_reason is not None:
            self._set_suspect(member, None)
        state = _up_state(member)
        if member.state is not state:
            values = (state, instance_id, member.info.role, server_info.model)
            logger.info("instance %s instance=%s role=%s model=%s", *values)
        member.state, member.server_info, member.answered_s = state, server_info, self._clock()
        member.reason = "" if member.suspect_reason is None else self._why(member)
        self._refresh()

    def suspect(self, member: Member, reason: str) -> None:
        """Make a static server that is up suspect, until it has `joined` again. Idempotent."""
        if member.is_up and member.suspect_reason is None:
            self._set_suspect(member, SuspectReason.SILENT, reason)

    def lost_contact(
        self, instance_id: InstanceId, epoch: Epoch, reason: str, *, has_exited: bool = False
    ) -> None:
        """Take the instance down: no requests until a probe succeeds. Idempotent."""
        member = self._find(instance_id, epoch)
        if member is None:
            return
        if member.is_up:
            logger.warning("instance down instance=%s reason=%s", instance_id, reason)
            member.lost_s = self._clock()
        member.state, member.reason, member.has_exited = State.DOWN, reason, has_exited
        self.probe_needed.set()
        self._refresh()

    def process_status(self, instance_id: InstanceId, epoch: Epoch) -> ProcessStatus:
        """Whether the process of a lost instance still runs."""
        member = self._find(instance_id, epoch)
        return ProcessStatus.EXITED if member is None else member.process_status

    def shift_deadlines(self, seconds: float) -> None:
        """Extend all heartbeat deadlines: the router itself could not receive for that time."""
        for member in self.members():
            member.seen_s += seconds

    def check_heartbeats(self) -> None:
        """Make registered instances without heartbeats suspect, then down; forget them in the end."""
        now_s = self._clock()
        for member in self.members():
            if member.is_static:
                continue
            info, silent_s = member.info, now_s - max(member.seen_s, member.answered_s)
            self._consider(member)
            if member.is_up and silent_s > self._config.down_heartbeats * self.heartbeat_s:
                reason = self._why(member)
                self.lost_contact(info.instance_id, info.epoch, reason)
                self.on_unresponsive(info.url, reason)
            if silent_s > self._config.forget_heartbeats * self.heartbeat_s:
                self._forget(info.instance_id, f"{self._config.forget_heartbeats:g} heartbeats missed")

    def _find(self, instance_id: InstanceId, epoch: Epoch) -> Member | None:
        member = self._members.get(instance_id)
        return member if member is not None and member.info.epoch == epoch else None

    def _set_draining(self, member: Member, is_draining: bool) -> None:
        member.is_draining = is_draining
        if member.is_up:
            member.state = _up_state(member)
            self._refresh()

    def _heard(self, member: Member) -> None:
        member.seen_s = self._clock()
        self._consider(member)

    def _consider(self, member: Member) -> None:
        """Update the suspect reason of a registered member."""
        why = None
        if self._clock() - member.seen_s > self.suspect_after_s:
            why = SuspectReason.SILENT
        elif member.load is not None and member.load.step_age_s > self._config.stuck_secs:
            why = SuspectReason.STUCK
        if why is not member.suspect_reason:
            self._set_suspect(member, why)

    def _set_suspect(self, member: Member, why: SuspectReason | None, reason: str = "") -> None:
        member.suspect_reason = why
        if not member.is_up:
            return
        member.reason = "" if why is None else reason or self._why(member)
        name = member.info.instance_id
        if why is None:
            logger.info("instance is well again instance=%s", name)
        else:
            logger.warning("instance is suspect instance=%s reason=%s", name, member.reason)
        member.state = _up_state(member)
        self._refresh()

    def _why(self, member: Member) -> str:
        """The reason why `member` is suspect or down, for logs."""
        if member.suspect_reason is SuspectReason.STUCK and member.load is not None:
            return f"its scheduler has made no step for {member.load.step_age_s:.1f} s"
        return f"no heartbeat for {self._clock() - member.seen_s:.1f} s"

    def _add(self, info: InstanceInfo, *, static: bool, is_draining: bool = False) -> Member:
        member = Member(info, static, self._clock(), is_draining=is_draining)
        self._members[info.instance_id] = member
        self.probe_needed.set()
        self._refresh()
        return member

    def _forget(self, instance_id: InstanceId, reason: str) -> None:
        logger.info("instance gone instance=%s reason=%s", instance_id, reason)
        url = self._members.pop(instance_id).info.url
        if url in self._static:
            self._add(self._static[url], static=True)
        self._refresh()

    def _refresh(self) -> None:
        up = {name: one for name, member in self._members.items() if (one := member.instance) is not None}
        ready = [one for name, one in up.items() if not self._members[name].is_draining]
        suspect = {name for name in up if self._members[name].suspect_reason is not None}
        self._up, self._snapshot = (
            ClusterSnapshot.of(up.values()),
            ClusterSnapshot.of(_trusted(ready, suspect)),
        )


def _up_state(member: Member) -> State:
    if member.is_draining:
        return State.DRAINING
    return State.READY if member.suspect_reason is None else State.SUSPECT


def _trusted(instances: Sequence[Instance], suspect: Container[InstanceId]) -> list[Instance]:
    """The instances that are not suspect, and those that alone serve their model in their role."""
    sound = [one for one in instances if one.instance_id not in suspect]
    served = {(one.role, one.server_info.model) for one in sound}
    return [one for one in instances if one in sound or (one.role, one.server_info.model) not in served]
