"""How a process takes part in the exchange of blocks, and how it names the others. Knows no pools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import ConfigError
from memserve.core.ids import Epoch
from memserve.transport.registry import MooncakeProtocol, TransportName


@dataclass(frozen=True, slots=True)
class PeersConfig:
    """Without a cluster key everything stays on this host. Raises ConfigError for what cannot be."""

    host: str = "127.0.0.1"
    """Address to listen on, which peers are told."""
    control_port: int = 0
    """0: the system picks one."""
    transport: TransportName = "auto"
    cluster_key: ClusterKey | None = None
    mooncake_protocol: MooncakeProtocol = "rdma"
    ib_device: str = ""
    """RDMA devices for mooncake, comma-separated; empty: all."""
    timeout_s: float = 5.0
    """Of each step of an exchange."""
    reservation_s: float = 30.0
    """A reservation that has not ended by then is quarantined, its owner fenced, its blocks freed."""
    lease_s: float = 30.0
    """A peer's lease ends by itself after that; so do blocks that a peer sent and nobody claims."""

    def __post_init__(self) -> None:
        if min(self.timeout_s, self.reservation_s, self.lease_s) <= 0:
            raise ConfigError("the peers' timeouts must be above 0 seconds")
        if self.host in ("", "0.0.0.0", "::", "[::]", "*"):
            raise ConfigError(f"peers cannot reach {self.host!r}: name the address they should use")


class PeerAddress(NamedTuple):
    """One life of another process's pools."""

    control: str
    """`host:port` of its control server."""
    epoch: Epoch

    def __str__(self) -> str:
        return f"{self.control}:{self.epoch:016x}"
