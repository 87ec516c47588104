"""Keeps one instance known to the router, from the moment it is ready until it stops.

Knows the control messages; not what the instance serves, nor how.
"""

from __future__ import annotations

from memserve.disagg.presence import Presence, Words
from memserve.wire.link import ControlClient
from memserve.wire.messages import Accepted, Deregister, Heartbeat, InstanceInfo, Message, Register


class Registrar:
    """Registers `info`, then sends heartbeats on a thread of its own (see Presence)."""

    def __init__(self, client: ControlClient, info: InstanceInfo) -> None:
        """Takes `client` and closes it in the end."""
        words = Words(
            name=f"instance={info.instance_id}",
            register=Register(info),
            heartbeat=lambda: Heartbeat(info.instance_id, info.epoch),
            deregister=Deregister(info.instance_id, info.epoch),
            heard=_heartbeat_s,
        )
        self._presence = Presence(client, words)

    def start(self) -> None:
        """Begin; the instance must be ready to serve."""
        self._presence.start()

    def close(self) -> None:
        """Deregister, if registered, and stop. Takes at most a few seconds; idempotent."""
        self._presence.close()


def _heartbeat_s(answer: Message) -> float | None:
    return answer.heartbeat_s if isinstance(answer, Accepted) else None
