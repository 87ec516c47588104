"""Reading the cache in /server_info; the pages are recorded from stock SGLang 0.5.23 servers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from memserve.router.server_info import (
    EventPublisher,
    EventSource,
    EventSourceInfo,
    ServerInfo,
    read_event_sources,
    read_server_info,
)
from memserve.wire.messages import Role

PUBLISHES = {
    "publisher": "zmq",
    "endpoint_host": "127.0.0.1",
    "endpoint_port_base": 52137,
    "topic": "kv",
    "block_size": 16,
    "dp_size": 1,
    "replay_endpoint_port_base": 42161,
}
CONFIG = (
    '{"publisher":"zmq","endpoint":"tcp://127.0.0.1:52137","bind":true,'
    '"replay_endpoint":"tcp://127.0.0.1:42161","topic":"kv"}'
)
SERVER_INFO: dict[str, Any] = {
    "page_size": 16,
    "max_total_num_tokens": 1024,
    "max_total_tokens": 1024,
    "disable_radix_cache": False,
    "disaggregation_mode": "null",
    "dp_size": 1,
    "attn_dp_size": 1,
    "dcp_size": 1,
    "startup_time": {"load_weight": 0.02403804899950046, "scheduler_e2e": 1.9181070390004606},
    "kv_events_config": CONFIG,
    "kv_events": PUBLISHES,
}
PUBLISHER = EventPublisher("127.0.0.1", 52137, 42161, "kv", 1)


def info(**changes: Any) -> dict[str, Any]:
    return {**SERVER_INFO, **changes}


def publishes(**changes: Any) -> dict[str, Any]:
    return info(kv_events={**PUBLISHES, **changes})


def test_read_event_sources_reads_cache_and_events() -> None:
    assert read_event_sources(SERVER_INFO) == EventSourceInfo(True, 16, 1024, PUBLISHER, 1.9181070390004606)
    assert read_event_sources(SERVER_INFO).capacity_blocks == 64
    assert PUBLISHER.sources("http://worker:30000") == (
        EventSource("tcp://127.0.0.1:52137", "kv", "tcp://127.0.0.1:42161"),
    )


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "::"])
def test_event_source_replaces_a_wildcard_by_the_workers_host(host: str) -> None:
    events = read_event_sources(
        info(kv_events={**PUBLISHES, "endpoint_host": host, "dp_size": 2}, kv_events_config="{}")
    ).events
    assert events is not None
    assert [source.endpoint for source in events.sources("http://[fd00::1]:30000")] == [
        "tcp://[fd00::1]:52137",
        "tcp://[fd00::1]:52138",
    ]
    assert events.sources("http://worker:1")[1].replay == "tcp://worker:42162"
    assert events.sources("nonsense") == ()


def test_cache_capacity_includes_all_ranks_and_shards() -> None:
    following = read_event_sources(info(dp_size=2, attn_dp_size=1, dcp_size=4, kv_events=None))
    assert (following.page_tokens, following.capacity_tokens, following.capacity_blocks) == (64, 2048, 32)


def test_cache_capacity_is_at_least_one_block() -> None:
    assert read_event_sources(info(max_total_num_tokens=3)).capacity_blocks == 1


@pytest.mark.parametrize("disabled", [True, None, "false", 0])
def test_server_without_radix_cache_keeps_nothing(disabled: object) -> None:
    assert not read_event_sources(info(disable_radix_cache=disabled)).keeps


@pytest.mark.parametrize(
    "server_info",
    [
        info(kv_events=None),
        info(kv_events="zmq"),
        info(kv_events_config=None),
        info(kv_events_config="{"),
        info(kv_events_config="[" * 100_000),
        info(kv_events_config='{"bind":false}'),
        publishes(publisher="null"),
        publishes(endpoint_host=7),
        publishes(endpoint_port_base="52137"),
        publishes(endpoint_port_base=True),
        publishes(endpoint_port_base=-1),
        publishes(endpoint_port_base=65536),
        publishes(endpoint_port_base=65535, dp_size=2),
        publishes(endpoint_host="evil\0host"),
        publishes(topic=None),
        publishes(topic="\ud800"),
        publishes(dp_size=0),
        publishes(dp_size=1 << 70),
        publishes(block_size=32),
    ],
)
def test_read_event_sources_ignores_unreachable_events(server_info: dict[str, Any]) -> None:
    following = read_event_sources(server_info)
    assert (following.keeps, following.events) == (True, None)


def test_read_event_sources_ignores_an_unreachable_replay() -> None:
    for port in (None, "1", 70000):
        events = read_event_sources(publishes(replay_endpoint_port_base=port)).events
        assert events == EventPublisher("127.0.0.1", 52137, None, "kv", 1)


@pytest.mark.parametrize(
    "server_info",
    [{}, dict.fromkeys(SERVER_INFO), {key: [1] for key in SERVER_INFO}, dict.fromkeys(SERVER_INFO, -1)],
)
def test_read_event_sources_ignores_malformed_pages(server_info: dict[str, Any]) -> None:
    assert read_event_sources(server_info) == EventSourceInfo()


def read(server_info: dict[str, Any]) -> ServerInfo:
    model = {"model_path": "/only/on/the/servers/machine"}
    pages = (json.dumps(page).encode() for page in (model, server_info, {"data": [{"id": "m"}]}))
    return read_server_info("http://worker:30000", Role.COLOCATED, *pages)


@pytest.mark.parametrize(
    ("states", "vocab_size"),
    [
        ([{"memserve": {"vocab_size": 260}}], 260),
        ([{"memserve": {}}], None),
        ([{"memserve": {"vocab_size": "x"}}], None),
        ([{}], None),
        ([], None),
        ("x", None),
    ],
)
def test_vocabulary_of_a_model_elsewhere_is_what_the_server_tells(
    states: Any, vocab_size: int | None
) -> None:
    assert read(info(internal_states=states)).vocab_size == vocab_size


def test_extras_that_a_server_returns_are_read() -> None:
    told = info(enable_return_hidden_states=True, enable_return_routed_experts=False)
    assert read(told).returned == {"return_hidden_states"}
