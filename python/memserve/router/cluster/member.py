"""What is known of one instance: its state, and why. A plain record."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from memserve.router.server_info import ServerInfo
from memserve.wire.messages import InstanceInfo, Load, Role


class SuspectReason(StrEnum):
    """Why an instance that has registered is suspect."""

    SILENT = "silent"
    """Its heartbeats have stopped."""
    STUCK = "stuck"
    """They come, but its scheduler makes no step."""


class State(StrEnum):
    """What the router believes of a member."""

    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"
    """It may be on its way out, or hang."""
    DRAINING = "draining"
    """It ends what it has, and gets nothing new."""
    DOWN = "down"


class ProcessStatus(StrEnum):
    """What became of a process that was lost."""

    ALIVE = "alive"
    """It has been heard of since, or answers again."""
    EXITED = "exited"
    """Nobody listens at its port, or it is known no more."""
    UNKNOWN = "unknown"


@dataclass(slots=True)
class Member:
    """One instance the cluster knows of. Changed by `Cluster` only."""

    info: InstanceInfo
    is_static: bool
    seen_s: float
    state: State = State.JOINING
    server_info: ServerInfo | None = None
    reason: str = "not seen yet"
    """Why it does not answer."""
    is_draining: bool = False
    """It gets nothing new, also when it answers again."""
    suspect_reason: SuspectReason | None = None
    new_role: Role | None = None
    """It is to start anew as this; told with each heartbeat."""
    load: Load | None = None
    """As of its last heartbeat."""
    answered_s: float = float("-inf")
    """When a probe last found it serving."""
    lost_s: float = float("inf")
    """When it went down."""
    has_exited: bool = False
    """Nobody listens at its port."""

    @property
    def is_up(self) -> bool:
        """It answers, or did a moment ago, and may have requests to end."""
        return self.state in (State.READY, State.SUSPECT, State.DRAINING)

    @property
    def process_status(self) -> ProcessStatus:
        """What became of it if it was lost."""
        if self.is_up or self.seen_s > self.lost_s:
            return ProcessStatus.ALIVE
        return ProcessStatus.EXITED if self.has_exited else ProcessStatus.UNKNOWN
