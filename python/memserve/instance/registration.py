"""Keeps an instance or a pool registered at the router, from the moment it is ready until it closes.

    register ──accepted──> heartbeat every heartbeat_s ──close──> deregister
       ^  └─ any other, or none: again every RETRY_S       │
       └───────────── any other answer, or none ───────────┘

Knows when to send which message, not what they mean.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from memserve.core.errors import InstanceLost, MemServeError
from memserve.wire.link import ControlClient
from memserve.wire.messages import Message, Refused

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 2.0
RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class RegistrationMessages:
    """The messages of one registrant, and the meaning of the router's answers."""

    name: str
    """Kind and name of the registrant, for the log."""
    register: Callable[[], Message]
    heartbeat: Callable[[], Message]
    deregister: Callable[[], Message]
    on_answer: Callable[[Message], float | None]
    """Takes each answer; returns the heartbeat interval in seconds if it is an acceptance."""


class RouterRegistration:
    """Sends `messages` to the router on a thread of its own.

    If the router does not answer, it is asked again every half second; a restarted router answers
    `Unknown` and gets the registration again.
    """

    def __init__(self, client: ControlClient, messages: RegistrationMessages) -> None:
        """Takes `client` and closes it in the end."""
        self._client = client
        self._messages = messages
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registration", daemon=True)

    def start(self) -> None:
        """Begin; the registrant must be ready."""
        self._thread.start()

    def close(self) -> None:
        """Deregister, if registered, and stop. Takes at most a few seconds; idempotent."""
        if not self._closing.is_set():
            self._closing.set()
            if self._thread.is_alive():
                self._thread.join(timeout=2 * ANSWER_TIMEOUT_S)

    def _run(self) -> None:
        try:
            registered = False
            warned = False
            interval_s = 0.0
            while not self._closing.wait(interval_s):
                answer = self._tell(self._messages.heartbeat() if registered else self._messages.register())
                heartbeat_s = self._messages.on_answer(answer)
                if heartbeat_s is not None:
                    if not registered:
                        logger.info("registered router=%s %s", self._client.address, self._messages.name)
                    registered, warned, interval_s = True, False, heartbeat_s
                    continue
                if not warned and not registered:
                    reason = answer.reason if isinstance(answer, Refused) else str(answer)
                    logger.warning("not registered, will keep trying: %s", reason)
                    warned = True
                interval_s = 0.0 if registered else RETRY_S
                registered = False
            if registered:
                self._tell(self._messages.deregister())
            self._client.close()
        except Exception:
            logger.exception(
                "the thread that keeps in touch with the router failed; this process cannot go on"
            )
            os._exit(1)

    def _tell(self, message: Message) -> Message:
        """The router's answer; an error comes back as a Refused."""
        try:
            return self._client.request(message, timeout_s=ANSWER_TIMEOUT_S)
        except InstanceLost as error:
            return Refused(f"no router at {error}; use the control address that launch_router prints")
        except MemServeError as error:
            return Refused(str(error))
