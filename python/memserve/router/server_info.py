"""Reads a server's /server_info, /model_info and /v1/models into one record. Pure.

Source: SGLang 0.5.23, disaggregation/decode.py (pop_preallocated, _required_admission_tokens): a decode
admits a request when the prompt, in whole pages, and a reserve for the answer are free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TypeGuard
from urllib.parse import urlsplit

from memserve.core.errors import InstanceLost
from memserve.core.hosts import bracketed
from memserve.wire.messages import Role

RESERVED_TOKENS = 512
"""SGLang's default of --num-reserved-decode-tokens."""
MAX_DP_SIZE = 1024
"""Upper bound on the caches of one server."""
MAX_NUMBER = 1 << 40

_MODES = {"prefill": Role.PREFILL, "decode": Role.DECODE, "null": Role.COLOCATED}
_WILDCARDS = frozenset({"*", "0.0.0.0", "::", ""})


@dataclass(frozen=True, slots=True)
class EventSource:
    """The addresses where one cache publishes its events, as ZMQ writes them."""

    endpoint: str
    topic: str
    replay: str | None
    """Repeats missed events; None: not available."""


@dataclass(frozen=True, slots=True)
class EventPublisher:
    """The sockets that a server has bound for its cache events: one port per cache."""

    host: str | None
    """None: all addresses of the machine."""
    port: int
    replay_port: int | None
    topic: str
    num_caches: int

    def sources(self, url: str) -> tuple[EventSource, ...]:
        """One source per cache of the server at `url`; empty if the URL has no host."""
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
    """A server's radix cache as /server_info describes it; None: not reported."""

    keeps: bool = False
    """The server has a radix cache. False if it does not report one, as servers other than SGLang."""
    page_tokens: int | None = None
    """Tokens per block."""
    capacity_tokens: int | None = None
    """Tokens in all its caches."""
    events: EventPublisher | None = None
    start_s: float | None = None
    """Start time of its scheduler, to the nanosecond: differs between two processes."""

    @property
    def capacity_blocks(self) -> int | None:
        """Blocks in all its caches; at least 1."""
        if self.page_tokens is None or self.capacity_tokens is None:
            return None
        return max(1, self.capacity_tokens // self.page_tokens)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server's model and limits; None: not reported."""

    model: str
    model_path: str
    context_tokens: int | None = None
    """None also if the server truncates longer prompts."""
    vocab_size: int | None = None
    page_size: int | None = None
    takes_empty_text: bool = False
    """Its tokenizer makes at least one token of "". A prompt without tokens ends an SGLang server."""
    model_info: bytes = field(default=b"{}", repr=False)
    """The body of its /model_info, JSON."""
    event_source_info: EventSourceInfo = field(default_factory=EventSourceInfo)
    """How to follow its cache if it has no memory pool."""
    max_prompt_tokens: int | None = None
    """The longest prompt that this decode server can admit."""
    is_deterministic: bool = False
    """Each token depends only on the request's seed and the token's position."""
    is_on_cpu: bool = False
    """It has no GPU."""
    returned: frozenset[str] = frozenset()
    """The fields of a request, of those that cost extra, that it was started to answer."""

    def serves(self, model: str) -> bool:
        """True if requests for `model` may come here; `model:adapter`, SGLang's LoRA syntax, counts."""
        return f"{model}:".startswith(f"{self.model}:")


def read_server_info(
    url: str, role: Role, model_info: bytes, server_info: bytes, models: bytes
) -> ServerInfo:
    """The record of SGLang's three information pages.

    Raises InstanceLost for a server with another role, ValueError for pages of another program.
    """
    model, server, cards = json.loads(model_info), json.loads(server_info), json.loads(models)
    if not (isinstance(model, dict) and isinstance(server, dict) and isinstance(cards, dict)):
        raise ValueError(f"{url} does not describe itself as SGLang does")
    mode = server.get("disaggregation_mode")
    if mode in _MODES and _MODES[mode] is not role:
        raise InstanceLost(url, f"named as {role}, but it runs as {_MODES[mode]}")
    path = str(model.get("model_path", ""))
    cache = read_event_sources(server)
    card: dict[str, object] = next(iter(cards.get("data") or []), {})
    return ServerInfo(
        model=str(model.get("served_model_name") or card.get("id") or path),
        model_path=path,
        context_tokens=None if server.get("allow_auto_truncate") else _integer(card.get("max_model_len")),
        vocab_size=read_vocab_size(path) or _told_vocab_size(server),
        page_size=cache.page_tokens,
        model_info=model_info,
        event_source_info=cache,
        max_prompt_tokens=read_max_prompt_tokens(server, cache.page_tokens),
        is_deterministic=server.get("enable_deterministic_inference") is True,
        is_on_cpu=server.get("device") == "cpu",
        returned=frozenset(
            name.removeprefix("enable_")
            for name, value in server.items()
            if name.startswith("enable_return_") and value is True
        ),
    )


def read_vocab_size(model_path: str) -> int | None:
    """The embedding size of a model directory on this machine; None if there is none."""
    try:
        config = json.loads((Path(model_path) / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    text = config.get("text_config")
    return _integer(config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None))


def _told_vocab_size(server_info: Mapping[str, object]) -> int | None:
    """The vocabulary size that a server started by MemServe reports; None for others."""
    states = server_info.get("internal_states")
    state = states[0] if isinstance(states, list) and states else None
    told = state.get("memserve") if isinstance(state, dict) else None
    return _integer(told.get("vocab_size")) if isinstance(told, dict) else None


def read_max_prompt_tokens(server_info: Mapping[str, object], page_tokens: int | None) -> int | None:
    """The longest prompt that a decode with this /server_info admits; None: not reported."""
    size, reserved = (
        server_info.get("max_total_num_tokens"),
        server_info.get("num_reserved_decode_tokens", RESERVED_TOKENS),
    )
    if server_info.get("disaggregation_mode") != "decode" or not isinstance(size, int) or page_tokens is None:
        return None
    threshold = server_info.get("disaggregation_decode_host_receive_threshold", 1)
    if server_info.get("enable_hisparse") or threshold != 1 or not isinstance(reserved, int):
        return None  # host memory may hold what exceeds the device
    return max(0, size - reserved) // page_tokens * page_tokens


def read_event_sources(server_info: Mapping[str, object]) -> EventSourceInfo:
    """The cache in a parsed /server_info. Never raises: malformed values count as not reported."""
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
    """None also if its sockets connect instead of bind: the router cannot connect to those."""
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
    """A text that is valid in a ZMQ address or topic."""
    return isinstance(value, str) and value.isprintable()


def _binds(config: object) -> bool:
    """True if a publisher with one address binds it; SGLang's default is to connect."""
    if not isinstance(config, str):
        return False
    try:
        parsed = json.loads(config)
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict) and parsed.get("bind") is True


def _number(value: object) -> int | None:
    """A positive integer below MAX_NUMBER, else None."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < MAX_NUMBER:
        return value
    return None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
