"""The transports that a process offers, and the choice of one between two processes.

The place to add a transport: its name, and how it is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import ConfigError, TransferFailed
from memserve.core.hosts import is_loopback
from memserve.core.ids import Epoch
from memserve.transport.base import Peer, Transport
from memserve.transport.local.transport import LocalTransport, same_host
from memserve.transport.mooncake import MooncakeTransport, rdma_devices
from memserve.transport.regions import RegionTable
from memserve.transport.tcp.client import TcpTransport

logger = logging.getLogger(__name__)

TransportName = Literal["auto", "local", "tcp", "mooncake"]
MooncakeProtocol = Literal["rdma", "tcp"]


@dataclass(frozen=True, slots=True)
class TransportConfig:
    """How this process is reached and by which transports. Without a cluster key it stays on this host.

    Raises ConfigError for a host that peers cannot reach.
    """

    transport: TransportName = "auto"
    host: str = "127.0.0.1"
    """Address to listen on, which peers are told."""
    control_port: int = 0
    """0: the system picks one."""
    cluster_key_file: str | None = None
    mooncake_protocol: MooncakeProtocol = "rdma"
    ib_device: str = ""
    """RDMA devices for mooncake, comma-separated; empty: all."""

    def __post_init__(self) -> None:
        if self.host in ("", "0.0.0.0", "::", "[::]", "*"):
            raise ConfigError(f"peers cannot reach {self.host!r}: name the address they should use")

    def cluster_key(self) -> ClusterKey | None:
        """The key in the file, None without a file. Raises ConfigError if it cannot be read."""
        return ClusterKey.read(Path(self.cluster_key_file)) if self.cluster_key_file is not None else None


def open_transports(config: TransportConfig, key: ClusterKey | None, epoch: Epoch) -> tuple[Transport, ...]:
    """The transports that this process offers in a data epoch, best first.

    `auto` offers what the host allows, with one log line for each transport that it does not. Raises
    ConfigError if a transport was named and cannot be opened.
    """
    if config.transport == "local":
        return (LocalTransport(epoch),)
    if config.transport == "tcp":
        return (TcpTransport(epoch, config.host, key=key),)
    if config.transport == "mooncake":
        return (_mooncake(config, epoch),)
    offered: list[Transport] = [TcpTransport(epoch, config.host, key=key)]
    try:
        offered.insert(0, LocalTransport(epoch))
    except ConfigError as error:
        logger.warning("local transport not offered, tcp takes over: %s", error)
    if config.mooncake_protocol == "rdma" and rdma_devices() and not is_loopback(config.host):
        try:
            offered.insert(-1, _mooncake(config, epoch))
        except ConfigError as error:
            logger.warning("mooncake transport not offered, tcp takes over: %s", error)
    return tuple(offered)


def ranked(own: Sequence[Transport], offered: Mapping[str, str]) -> tuple[Transport, ...]:
    """Our transports that may reach a peer with the transports `offered` (name: address), best first."""
    return tuple(
        transport
        for transport in own
        if transport.name in offered
        and (transport.name != "local" or same_host(transport.address, offered["local"]))
    )


def connect_best(
    own: Sequence[Transport],
    name: str,
    epoch: Epoch,
    offered: Mapping[str, str],
    regions: RegionTable,
    *,
    timeout_s: float,
) -> tuple[Transport, Peer]:
    """The best of our transports that reaches the process `name`, after a successful connection.

    Raises TransferFailed if no transport reaches it; other errors as of a copy.
    """
    for transport in ranked(own, offered):
        peer = Peer(name, epoch, offered[transport.name], regions)
        try:
            transport.connect(peer, timeout_s=timeout_s)
        except TransferFailed as error:
            logger.warning("transport=%s cannot be used peer=%s: %s", transport.name, name, error.reason)
            continue
        return transport, peer
    ours = ", ".join(transport.name for transport in own)
    raise TransferFailed(name, f"no transport reaches it: here {ours}; there {', '.join(offered)}")


def _mooncake(config: TransportConfig, epoch: Epoch) -> MooncakeTransport:
    return MooncakeTransport(epoch, config.host, config.mooncake_protocol, config.ib_device)
