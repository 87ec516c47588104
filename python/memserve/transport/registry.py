"""Which transports a process offers, and which of them two processes use with each other.

Knows the transports by name, not when to ask.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """What transports need to know of the process they serve."""

    epoch: Epoch
    host: str
    """Address that network transports listen on and peers reach."""
    key: ClusterKey | None
    port: int = 0
    """Port of `tcp`; 0: the system picks one."""
    mooncake_protocol: MooncakeProtocol = "rdma"
    devices: str = ""
    """RDMA devices for `mooncake`, comma-separated; empty: all."""


def open_transports(wanted: TransportName, place: TransportConfig) -> tuple[Transport, ...]:
    """The transports that this process offers, best first.

    `auto` offers what the host allows, one log line for what it does not. Raises ConfigError if
    the one that was named cannot be had.
    """
    if wanted == "local":
        return (LocalTransport(place.epoch),)
    if wanted == "tcp":
        return (_tcp(place),)
    if wanted == "mooncake":
        return (_mooncake(place),)
    offered: list[Transport] = [_tcp(place)]
    try:
        offered.insert(0, LocalTransport(place.epoch))
    except ConfigError as error:
        logger.warning("local transport not offered, tcp takes over: %s", error)
    if place.mooncake_protocol == "rdma" and rdma_devices() and not is_loopback(place.host):
        try:
            offered.insert(-1, _mooncake(place))
        except ConfigError as error:
            logger.warning("mooncake transport not offered, tcp takes over: %s", error)
    return tuple(offered)


def ranked(own: Sequence[Transport], offered: Mapping[str, str]) -> tuple[Transport, ...]:
    """Those of our transports that may reach a peer which offers `offered` (name: address), best first."""
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
    """The best of our transports that reaches the process `name`, tried for real.

    Raises TransferFailed if there is none; other errors as of a copy.
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


def _tcp(place: TransportConfig) -> TcpTransport:
    return TcpTransport(place.epoch, place.host, place.port, key=place.key)


def _mooncake(place: TransportConfig) -> MooncakeTransport:
    return MooncakeTransport(place.epoch, place.host, place.mooncake_protocol, place.devices)
