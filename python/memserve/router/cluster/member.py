"""The state of one member of the cluster, and its reason. A plain record."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from memserve.router.cluster.instance import Instance
from memserve.router.server_info import ServerInfo
from memserve.wire.messages import InstanceInfo, Load, Role


class SuspectReason(StrEnum):
    """Why a registered instance is suspect."""

    SILENT = "silent"
    """No heartbeats arrive."""
    STUCK = "stuck"
    """Heartbeats arrive, but its scheduler makes no step."""


class State(StrEnum):
    """The state of a member; the diagram is in `registry`."""

    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"
    """It may be leaving, or hang."""
    DRAINING = "draining"
    """It finishes its requests and gets no new ones."""
    DOWN = "down"


class ProcessStatus(StrEnum):
    """Whether a process still runs after contact was lost."""

    ALIVE = "alive"
    """It sent a heartbeat, or answered a probe, after the loss."""
    EXITED = "exited"
    """Its port refuses connections, or it is not a member any more."""
    UNKNOWN = "unknown"


@dataclass(slots=True)
class Member:
    """One instance. Changed by `InstanceRegistry` only."""

    info: InstanceInfo
    is_static: bool
    seen_s: float
    state: State = State.JOINING
    server_info: ServerInfo | None = None
    reason: str = "not seen yet"
    """Why it is not ready."""
    is_draining: bool = False
    """It gets no new requests, also after lost contact."""
    suspect_reason: SuspectReason | None = None
    new_role: Role | None = None
    """The role to restart in; sent with each heartbeat's answer."""
    load: Load | None = None
    """From its last heartbeat."""
    answered_s: float = float("-inf")
    """Time of the last successful probe."""
    lost_s: float = float("inf")
    """Time when it went down."""
    has_exited: bool = False
    """Its port refuses connections."""

    @property
    def is_up(self) -> bool:
        """It answers, or did a moment ago, and may have running requests."""
        return self.state in (State.READY, State.SUSPECT, State.DRAINING)

    @property
    def instance(self) -> Instance | None:
        """What requests are sent to; None while it is not up."""
        info = self.info
        if not self.is_up or self.server_info is None:
            return None
        return Instance(
            info.instance_id, info.epoch, info.role, info.url, info.bootstrap_port, self.server_info
        )

    @property
    def process_status(self) -> ProcessStatus:
        """Whether its process runs, if contact was lost."""
        if self.is_up or self.seen_s > self.lost_s:
            return ProcessStatus.ALIVE
        return ProcessStatus.EXITED if self.has_exited else ProcessStatus.UNKNOWN
