"""Keeps one thing known to the router, from the moment it is ready until it goes.

    register ──answer that counts──> heartbeat every heartbeat_s ──close──> deregister
       ^  └─ any other, or none: again every RETRY_S       │
       └───────────── any other answer, or none ───────────┘

Knows when to say what; not what it means.
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
    """What is said to the router of one thing, and what its answers mean."""

    name: str
    """For the log: what it is, and its name."""
    register: Callable[[], Message]
    heartbeat: Callable[[], Message]
    deregister: Message
    heard: Callable[[Message], float | None]
    """Takes each answer; the heartbeat interval in seconds if it says that the thing is known."""


class RouterRegistration:
    """Says `words` to the router on a thread of its own.

    A router that is away is asked again every half second; one that restarted answers `Unknown`
    and gets the registration anew.
    """

    def __init__(self, client: ControlClient, words: RegistrationMessages) -> None:
        """Takes `client` and closes it in the end."""
        self._client = client
        self._words = words
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        """Begin; what `words` are about must be ready."""
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
                answer = self._tell(self._words.heartbeat() if registered else self._words.register())
                heartbeat_s = self._words.heard(answer)
                if heartbeat_s is not None:
                    if not registered:
                        logger.info("registered router=%s %s", self._client.address, self._words.name)
                    registered, warned, interval_s = True, False, heartbeat_s
                    continue
                if not warned and not registered:
                    reason = answer.reason if isinstance(answer, Refused) else str(answer)
                    logger.warning("not registered, will keep trying: %s", reason)
                    warned = True
                interval_s = 0.0 if registered else RETRY_S
                registered = False
            if registered:
                self._tell(self._words.deregister)
            self._client.close()
        except Exception:
            logger.exception(
                "the thread that keeps in touch with the router failed; this process cannot go on"
            )
            os._exit(1)

    def _tell(self, message: Message) -> Message:
        """The router's answer; what kept it from answering comes back as a Refused."""
        try:
            return self._client.request(message, timeout_s=ANSWER_TIMEOUT_S)
        except InstanceLost as error:
            return Refused(f"no router at {error}; use the control address that launch_router prints")
        except MemServeError as error:
            return Refused(str(error))
