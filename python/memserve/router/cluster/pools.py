"""The registered memory pools, so that instances can exchange blocks. No I/O; the clock is passed in.

    register ──> member ──deregister, no heartbeat──> forgotten
                    └──another in its place──> replaced, and refused as long as that one is there

Knows what pools report of themselves, not which blocks they hold.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from memserve.core.ids import Epoch, InstanceId, server_of
from memserve.router.cluster.config import ClusterConfig
from memserve.wire.messages import Members, PoolInfo, Role, TierBlocks

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class PoolMember:
    """One registered pool. Changed by `Pools` only."""

    info: PoolInfo
    since_s: float
    seen_s: float
    tiers: tuple[TierBlocks, ...] = ()
    """Block counts from its last heartbeat."""


class Pools:
    """The registered pools, one per epoch, with a version. Event loop thread only."""

    def __init__(
        self,
        config: ClusterConfig,
        clock: Callable[[], float],
        *,
        wants_prompt_keys: bool = False,
    ) -> None:
        """`wants_prompt_keys`: as in `Members`."""
        self._config = config
        self.heartbeat_s = config.heartbeat_secs
        self._clock = clock
        self._wants_prompt_keys = wants_prompt_keys
        self._members: dict[Epoch, PoolMember] = {}
        self._successors: dict[Epoch, Epoch] = {}
        """By replaced pool, the pool that replaced it."""
        self._version = secrets.randbits(62)
        """Random at first: the members of a router that restarted never seem unchanged."""
        self._suspect = frozenset[InstanceId]()
        self._grouped_at = -1
        self._grouped: dict[InstanceId, tuple[PoolInfo, ...]] = {}
        self._memories: tuple[InstanceId, ...] = ()

    @property
    def version(self) -> int:
        """Changes whenever a pool joins or leaves."""
        return self._version

    def members(self) -> list[PoolMember]:
        """Every pool, in the order in which they came."""
        return list(self._members.values())

    def infos(self) -> tuple[PoolInfo, ...]:
        """The registration of every pool, in the same order."""
        return tuple(member.info for member in self._members.values())

    def of(self, server: InstanceId) -> tuple[PoolInfo, ...]:
        """The pools of one server's ranks, tensor and data parallel."""
        return self._by_server().get(server, ())

    def memories(self) -> tuple[InstanceId, ...]:
        """The memory instances, except those that have missed heartbeats."""
        self._by_server()
        return self._memories

    def age_s(self, member: PoolMember) -> float:
        """Time since it registered."""
        return self._clock() - member.since_s

    def rejection_reason(self, info: PoolInfo) -> str | None:
        """Why the pool cannot register; None if it can.

        Two pools with one id and layout would replace each other for ever.
        """
        successor = self._successors.get(info.epoch)
        if successor is None:
            return None
        return (
            f"epoch {successor:016x} has taken the place of this pool: pools of one layout need an "
            f"instance id each, and {info.instance_id} is taken"
        )

    def register(self, info: PoolInfo) -> Members:
        """Add a pool. Idempotent; replaces one with the same instance and layout, or address."""
        now_s = self._clock()
        known = self._members.get(info.epoch)
        if known is not None and known.info == info:
            known.seen_s = now_s
            return self._all()
        for other in self.members():
            if _replaces(info, other.info):
                self._replace(other.info, info)
        self._members[info.epoch] = PoolMember(info, now_s, now_s)
        self._version += 1
        logger.info("pool registered %s", _names(info))
        return self._all()

    def heartbeat(self, epoch: Epoch, version: int, tiers: tuple[TierBlocks, ...] = ()) -> Members | None:
        """Record a heartbeat; the members if `version` is old. None if the pool has to register again."""
        member = self._members.get(epoch)
        if member is None:
            return None
        member.seen_s, member.tiers = self._clock(), tiers
        if version == self._version:
            return self._members_message(None)
        return self._all()

    def deregister(self, epoch: Epoch) -> None:
        """Remove the pool. Idempotent."""
        if epoch in self._members:
            self._forget(self._members[epoch].info, "it deregistered")

    def shift_deadlines(self, seconds: float) -> None:
        """Extend all heartbeat deadlines: the router itself could not receive for that time."""
        for member in self.members():
            member.seen_s += seconds

    def forget_silent(self) -> None:
        """Forget the pools whose heartbeats have stopped. Called several times per heartbeat."""
        deadline = self._clock() - self._config.forget_heartbeats * self.heartbeat_s
        heard_s = self._clock() - self._config.suspect_heartbeats * self.heartbeat_s
        suspect = frozenset(it.info.instance_id for it in self.members() if it.seen_s < heard_s)
        if suspect != self._suspect:
            self._suspect, self._grouped_at = suspect, -1
        for member in self.members():
            if member.seen_s < deadline:
                self._forget(member.info, f"{self._config.forget_heartbeats:g} heartbeats missed")

    def _all(self) -> Members:
        return self._members_message(self.infos())

    def _members_message(self, infos: tuple[PoolInfo, ...] | None) -> Members:
        return Members(self.heartbeat_s, self._version, infos, self._wants_prompt_keys)

    def _by_server(self) -> Mapping[InstanceId, tuple[PoolInfo, ...]]:
        if self._grouped_at != self._version:
            self._grouped_at, self._grouped = self._version, {}
            for info in self.infos():
                server = server_of(info.instance_id)
                self._grouped[server] = (*self._grouped.get(server, ()), info)
            self._memories = tuple(
                name
                for name, infos in self._grouped.items()
                if infos[0].role is Role.MEMORY and name not in self._suspect
            )
        return self._grouped

    def _replace(self, old: PoolInfo, new: PoolInfo) -> None:
        if old.epoch != new.epoch:
            self._successors |= dict.fromkeys((old.epoch, *self._replaced_by(old)), new.epoch)
        self._forget(old, "replaced")

    def _forget(self, info: PoolInfo, reason: str) -> None:
        logger.info("pool gone %s reason=%s", _names(info), reason)
        del self._members[info.epoch]
        for epoch in self._replaced_by(info):
            del self._successors[epoch]
        self._version += 1

    def _replaced_by(self, info: PoolInfo) -> list[Epoch]:
        return [epoch for epoch, successor in self._successors.items() if successor == info.epoch]


def _replaces(new: PoolInfo, old: PoolInfo) -> bool:
    """True if `new` takes the place of `old`."""
    same_place = (new.instance_id, new.layout) == (old.instance_id, old.layout)
    return new.epoch == old.epoch or same_place or new.address == old.address


def _names(info: PoolInfo) -> str:
    return f"instance={info.instance_id} role={info.role} epoch={info.epoch:016x} address={info.address}"
