"""The command line, and the configuration that it makes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from memserve.core.errors import ConfigError
from memserve.router.command_line import parse_args
from memserve.router.config import RECORDS, RouterConfig
from memserve.router.observability.config import LogConfig
from memserve.wire.messages import Role


def test_router_listens_on_loopback_by_default() -> None:
    config = parse_args([]).config
    assert (config.http.host, config.http.port) == ("127.0.0.1", 30000)
    assert (config.cluster.control_port, config.cluster.static) == (None, ())


def test_flags_name_stock_servers() -> None:
    argv = "--prefill http://a:1 9000 --prefill http://b:1/ --decode http://c:1 --worker-urls http://d:1 http://e:1"
    static = parse_args(argv.split()).config.cluster.static
    assert [(info.role, info.url, info.bootstrap_port) for info in static] == [
        (Role.PREFILL, "http://a:1", 9000),
        (Role.PREFILL, "http://b:1", 8998),
        (Role.DECODE, "http://c:1", None),
        (Role.COLOCATED, "http://d:1", None),
        (Role.COLOCATED, "http://e:1", None),
    ]


@pytest.mark.parametrize(
    "argv",
    [
        "--port 70000",
        "--suspect-heartbeats 4",
        "--policy magic",
        "--control-port -1",
        "--heartbeat-secs 0",
        "--request-timeout-secs nan",
        "--shutdown-grace-period-secs -1",
        "--max-body-bytes 0",
        "--retry-max-retries -1",
        "--retry-max-backoff-ms -1",
        "--cb-failure-threshold 0",
        "--cb-timeout-secs 0",
        "--prefill http://a:1 port",
        "--prefill http://a:1 1 2",
        "--decode a:1",
        "--decode http://",
        "--decode http://a:b",
        "--decode http://a:1 --prefill http://a:1",
    ],
)
def test_invalid_value_is_a_config_error_of_one_line(argv: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(argv.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argv", ["--bogus", "--port x", "--por 1"])
def test_unknown_flag_exits_with_2(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(argv.split())
    assert caught.value.code == 2
    assert argv.split()[0] in capsys.readouterr().err


def test_cluster_key_file_is_a_path() -> None:
    assert parse_args(["--cluster-key-file", "x.key"]).config.cluster.cluster_key_file == Path("x.key")
    assert RouterConfig().cluster.cluster_key_file is None


def test_router_config_finds_the_record_of_a_setting() -> None:
    config = RouterConfig.of(port=1, api_key="k", heartbeat_secs=3.0)
    assert (config.http.port, config.auth.api_key, config.cluster.heartbeat_secs) == (1, "k", 3.0)
    with pytest.raises(TypeError, match="no record has the settings prot"):
        RouterConfig.of(prot=1)


def test_config_records_share_no_setting() -> None:
    names = [field.name for record in (*RECORDS.values(), LogConfig) for field in fields(record)]
    assert len(names) == len(set(names))
