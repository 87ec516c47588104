"""What a server says of its cache in /server_info: how it can be followed from outside. Pure.

Knows SGLang's field names and nothing of sockets, trees or instances.
Source: SGLang 0.5.23, runtime_context.py (describe_kv_events_publisher), disaggregation/kv_events.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import TypeGuard
from urllib.parse import urlsplit

from memserve.core.hosts import bracketed

MAX_DP_SIZE = 1024
"""More caches than this no server has."""
MAX_NUMBER = 1 << 40

_WILDCARDS = frozenset({"*", "0.0.0.0", "::", ""})


@dataclass(frozen=True, slots=True)
class EventSource:
    """Where one cache tells of its changes; as ZMQ writes addresses."""

    endpoint: str
    topic: str
    replay: str | None
    """Who repeats what was missed; None if nobody does."""


@dataclass(frozen=True, slots=True)
class EventPublisher:
    """The sockets that a server has bound for its events: one port for each of its caches."""

    host: str | None
    """None: on all addresses of the machine."""
    port: int
    replay_port: int | None
    topic: str
    num_caches: int

    def sources(self, url: str) -> tuple[EventSource, ...]:
        """One for each cache of the server at `url`; none if there is no host in it."""
        host = bracketed(self.host or urlsplit(url).hostname or "")
        if not host:
            return ()
        return tuple(
            EventSource(
                f"tcp://{host}:{self.port + rank}",
                self.topic,
                None if self.replay_port is None else f"tcp://{host}:{self.replay_port + rank}",
            )
            for rank in range(self.num_caches)
        )


@dataclass(frozen=True, slots=True)
class EventSourceInfo:
    """A server's cache as seen from outside; None where it does not say."""

    keeps: bool = False
    """Whether it has a radix cache. A server that does not say is one that is not SGLang's."""
    page_tokens: int | None = None
    """Of one block of its radix cache."""
    capacity_tokens: int | None = None
    """Of all its caches."""
    events: EventPublisher | None = None
    start_s: float | None = None
    """How long its scheduler took to start, to the nanosecond: what tells one life from another."""

    @property
    def capacity_blocks(self) -> int | None:
        """Of all its caches; at least 1."""
        if self.page_tokens is None or self.capacity_tokens is None:
            return None
        return max(1, self.capacity_tokens // self.page_tokens)


def read_event_sources(server_info: Mapping[str, object]) -> EventSourceInfo:
    """What /server_info, parsed, says; what is not as SGLang writes it counts as not said. Never raises."""
    page = _number(server_info.get("page_size"))
    shards = _number(server_info.get("dcp_size")) or 1
    num_caches = (_number(server_info.get("dp_size")) or 1) * (_number(server_info.get("attn_dp_size")) or 1)
    tokens = _number(server_info.get("max_total_num_tokens"))
    page_tokens = None if page is None else page * shards
    startup = server_info.get("startup_time")
    start_s = startup.get("scheduler_e2e") if isinstance(startup, dict) else None
    return EventSourceInfo(
        keeps=server_info.get("disable_radix_cache") is False,
        page_tokens=page_tokens,
        capacity_tokens=None if tokens is None else tokens * min(num_caches, MAX_DP_SIZE),
        events=_publisher(server_info, page_tokens),
        start_s=start_s if isinstance(start_s, float) and isfinite(start_s) else None,
    )


def _publisher(server_info: Mapping[str, object], page_tokens: int | None) -> EventPublisher | None:
    """None also if it cannot be followed: it connects, instead of being connected to."""
    said = server_info.get("kv_events")
    if not isinstance(said, dict) or said.get("publisher") != "zmq":
        return None
    host, port, topic = said.get("endpoint_host"), _number(said.get("endpoint_port_base")), said.get("topic")
    num_caches, replay_port = _number(said.get("dp_size")), _number(said.get("replay_endpoint_port_base"))
    if not _is_text(host) or not _is_text(topic) or port is None or num_caches is None:
        return None
    if num_caches > MAX_DP_SIZE or port + num_caches > 65536 or said.get("block_size") != page_tokens:
        return None
    if host not in _WILDCARDS and not _binds(server_info.get("kv_events_config")):
        return None
    if replay_port is not None and replay_port + num_caches > 65536:
        replay_port = None
    return EventPublisher(None if host in _WILDCARDS else host, port, replay_port, topic, num_caches)


def _is_text(value: object) -> TypeGuard[str]:
    """Something that ZMQ takes for a part of an address, or a topic."""
    return isinstance(value, str) and value.isprintable()


def _binds(config: object) -> bool:
    """Whether a publisher of one address listens there: SGLang's own default is that it connects."""
    if not isinstance(config, str):
        return False
    try:
        parsed = json.loads(config)
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict) and parsed.get("bind") is True


def _number(value: object) -> int | None:
    """A positive number."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < MAX_NUMBER:
        return value
    return None
