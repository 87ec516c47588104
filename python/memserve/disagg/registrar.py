"""Keeps one instance known to the router, from the moment it is ready until it stops.

Knows the control messages; not what the instance serves, nor how.
"""

from __future__ import annotations

import logging
import os
import threading

from memserve.core.errors import InstanceLost, MemServeError
from memserve.wire.link import ControlClient
from memserve.wire.messages import Accepted, Deregister, Heartbeat, InstanceInfo, Message, Refused, Register

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 2.0
RETRY_S = 0.5


class Registrar:
    """Registers `info`, then sends heartbeats on a thread of its own.

    A router that is away is asked again every half second; one that restarted answers `Unknown`
    and gets the registration anew.
    """

    def __init__(self, client: ControlClient, info: InstanceInfo) -> None:
        """Takes `client` and closes it in the end."""
        self._client = client
        self._info = info
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registrar", daemon=True)

    def start(self) -> None:
        """Begin; the instance must be ready to serve."""
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
                answer = self._tell(self._heartbeat() if registered else Register(self._info))
                if isinstance(answer, Accepted):
                    if not registered:
                        logger.info(
                            "registered router=%s instance=%s", self._client.address, self._info.instance_id
                        )
                    registered, warned, interval_s = True, False, answer.heartbeat_s
                    continue
                if not warned and not registered:
                    logger.warning("not registered, will keep trying: %s", answer)
                    warned = True
                interval_s = 0.0 if registered else RETRY_S
                registered = False
            if registered:
                self._tell(Deregister(self._info.instance_id, self._info.epoch))
            self._client.close()
        except Exception:
            logger.exception("the registrar failed; this process cannot go on")
            os._exit(1)

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(self._info.instance_id, self._info.epoch)

    def _tell(self, message: Message) -> Message:
        """The router's answer; what kept it from answering comes back as a Refused."""
        try:
            return self._client.request(message, timeout_s=ANSWER_TIMEOUT_S)
        except InstanceLost as error:
            return Refused(f"no router at {error}; use the control address that launch_router prints")
        except MemServeError as error:
            return Refused(str(error))
