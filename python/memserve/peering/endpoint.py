"""The one end that peers of this process talk to: its epoch, its address, and who answers which message.

    Hello without a layout            the handoff's memory           (disagg)
    every other message               the pools, if there are any    (mempool.remote)

The handoff and the pools share the endpoint, the handshake and the process's epoch. Each opens its own
transports: on a GPU only mooncake reaches the engine's KV, and a pool that fences a peer must not stop
that peer's handoff. Knows no blocks.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future

from memserve.core.ids import new_epoch
from memserve.peering.local_regions import LocalRegions
from memserve.peering.remote_process import Connect, PeerAddress, welcome_of
from memserve.transport.registry import TransportConfig
from memserve.wire.link import ControlClient, ControlServer, Handler
from memserve.wire.messages import Message, Refused
from memserve.wire.peer_messages import Declined, Hello, Welcome

logger = logging.getLogger(__name__)


class TransferEndpoint:
    """One per process. Any thread may call any method."""

    def __init__(self, config: TransportConfig, connect: Connect | None = None) -> None:
        """Answer peers. Raises ConfigError if it cannot listen or read the cluster key.

        `connect` makes control links to peers; None: real ones.
        """
        self.epoch = new_epoch()
        self.key = key = config.cluster_key()
        self.connect: Connect = connect or (lambda address: ControlClient(address, key=key))
        self._handoff: LocalRegions | None = None
        self._pools: Handler | None = None
        self._control = ControlServer(config.host, config.control_port, self._answer, key=key)
        self.address = PeerAddress(self._control.address, self.epoch)
        logger.info("process can be reached address=%s epoch=%016x", *self.address)

    def serve_handoff(self, regions: LocalRegions) -> None:
        """Tell peers how these regions are reached."""
        self._handoff = regions

    def serve_pools(self, answer: Handler) -> None:
        """Answer everything but the handoff's Hello by `answer`, on the control thread."""
        self._pools = answer

    def close(self) -> None:
        """Answer no peer any more. Idempotent."""
        self._control.close()

    def _answer(self, message: Message) -> Message | Future[Message]:
        if isinstance(message, Hello) and message.layout is None:
            return self._welcome(message)
        if self._pools is not None:
            return self._pools(message)
        if isinstance(message, Hello):
            return Declined("there is no memory pool here")
        return Refused(f"no memory pool here answers {type(message).__name__}")

    def _welcome(self, hello: Hello) -> Message:
        if hello.peer_epoch != self.epoch:
            return Welcome(self.epoch, self.epoch, (), ())
        if self._handoff is None:
            return Declined("this process takes no handoff")
        return welcome_of(self.epoch, self._handoff.served(), self._handoff.addresses.regions)
