"""Which transports a process offers, and which of them two processes use with each other.

Knows the transports by name; `disagg` knows when to ask.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import ConfigError
from memserve.core.hosts import is_loopback
from memserve.core.ids import Epoch
from memserve.transport.base import Transport
from memserve.transport.local import LocalTransport, same_host
from memserve.transport.mooncake import MooncakeTransport, rdma_devices
from memserve.transport.tcp import TcpTransport

logger = logging.getLogger(__name__)

TransportName = Literal["auto", "local", "tcp", "mooncake"]
MooncakeProtocol = Literal["rdma", "tcp"]


@dataclass(frozen=True, slots=True)
class Place:
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


def open_transports(wanted: TransportName, place: Place) -> tuple[Transport, ...]:
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


def _tcp(place: Place) -> TcpTransport:
    return TcpTransport(place.epoch, place.host, place.port, key=place.key)


def _mooncake(place: Place) -> MooncakeTransport:
    return MooncakeTransport(place.epoch, place.host, place.mooncake_protocol, place.devices)
