"""Keeps one instance known to the router, from the moment it is ready until it stops.

Knows the control messages; not what the instance serves, nor how.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from memserve.instance.registration import RegistrationMessages, RouterRegistration
from memserve.wire.link import ControlClient
from memserve.wire.messages import (
    Accepted,
    Deregister,
    Heartbeat,
    InstanceInfo,
    Load,
    Message,
    Register,
    Role,
)

logger = logging.getLogger(__name__)


def _no_load() -> Load | None:
    return None


def _keep_role(_: Role) -> None:
    logger.warning("the router requests another role, which this instance cannot take")


class Registrar:
    """Registers `info`, then sends heartbeats on a thread of its own (see RouterRegistration)."""

    def __init__(
        self,
        client: ControlClient,
        info: InstanceInfo,
        load: Callable[[], Load | None] = _no_load,
        on_role: Callable[[Role], None] = _keep_role,
    ) -> None:
        """Takes `client` and closes it in the end. The thread of this object calls `load`.

        It calls `on_role` once, with the role that a router requests of this instance.
        """
        self._is_draining = False
        self._has_crashed = False
        self._on_role = on_role
        self._requested_role: Role | None = None
        messages = RegistrationMessages(
            name=f"instance={info.instance_id}",
            register=lambda: Register(info, self._is_draining),
            heartbeat=lambda: Heartbeat(info.instance_id, info.epoch, load()),
            deregister=lambda: Deregister(info.instance_id, info.epoch, self._has_crashed),
            on_answer=self._on_answer,
        )
        self._registration = RouterRegistration(client, messages)

    def start(self) -> None:
        """Begin; the instance must be ready to serve."""
        self._registration.start()

    def close(self) -> None:
        """Deregister, if registered, and stop. Takes at most a few seconds; idempotent."""
        self._registration.close()

    def crashed(self) -> None:
        """As `close`, and say that the instance has ended by itself with the requests that it has."""
        self._has_crashed = True
        self._registration.close()

    def _on_answer(self, answer: Message) -> float | None:
        if not isinstance(answer, Accepted):
            return None
        self._is_draining = answer.is_draining
        if answer.become is not None and self._requested_role is None:
            self._requested_role = answer.become
            self._on_role(answer.become)
        return answer.heartbeat_s
