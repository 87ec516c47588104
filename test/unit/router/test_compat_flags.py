"""A launch line written for sglang-router starts this router, with the same meaning if there is one.

`sglang_router_flags.txt`: every option of sglang-router 0.3.2, with a value for each that takes one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from memserve.core.errors import ConfigError
from memserve.router.command_line import CommandLine, parse_args
from memserve.router.compat import ALIASES, ELSEWHERE, SWITCHES
from memserve.router.config import RECORDS, RouterConfig
from memserve.router.observability.config import LogConfig
from memserve.wire.messages import Role

LINES = Path(__file__).with_name("sglang_router_flags.txt").read_text().splitlines()
TOGETHER = {
    "--selector": "--service-discovery",
    "--prefill-selector": "--service-discovery --decode-selector app=y",
    "--decode-selector": "--service-discovery --prefill-selector app=y",
    "--service-discovery": "--selector app=x",
    "--tls-cert-path": "--tls-key-path key.pem",
    "--tls-key-path": "--tls-cert-path cert.pem",
    "--client-key-path": "--client-cert-path cert.pem",
}


def setting(asked: CommandLine, name: str) -> Any:
    """The value of a setting, whichever record has it."""
    parts = [asked.logs, *(getattr(asked.config, part) for part in RECORDS)]
    (value,) = [getattr(part, name) for part in parts if hasattr(part, name)]
    return value


@pytest.mark.parametrize("line", LINES)
def test_every_flag_of_sglang_router_is_accepted(line: str) -> None:
    flag = line.split()[0]
    argv = f"{line} {TOGETHER.get(flag, '')}".split()
    config = parse_args(argv)
    remarks = [remark for remark in config.remarks if remark.startswith(flag)]
    says = flag in ELSEWHERE or flag == "--model-path"
    assert len(remarks) == says, remarks


def test_compat_tables_have_only_flags_of_sglang_router() -> None:
    names = {line.split()[0] for line in LINES}
    assert names >= ELSEWHERE.keys() | ALIASES.keys() | SWITCHES.keys()


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        ("--policy cache_aware", "policy", "prompt_tree"),
        ("--policy power_of_two", "policy", "power_of_two"),
        ("--policy round_robin", "policy", "round_robin"),
        ("--policy manual", "policy", "session"),
        ("--prefill-policy bucket", "prefill_policy", "least_load"),
        ("--decode-policy cache_aware", "decode_policy", "prompt_tree"),
        ("--max-payload-size 1000", "max_body_bytes", 1000),
        ("--max-payload-size=1000", "max_body_bytes", 1000),
        ("--cb-timeout-duration-secs 7", "cb_timeout_secs", 7.0),
        ("--disable-retries", "retry_max_retries", 0),
        ("--ca-cert-paths ca.pem", "ssl_ca_certs", Path("ca.pem")),
        ("--client-cert-path me.pem", "ssl_client_certfile", Path("me.pem")),
        ("--tls-cert-path a --tls-key-path b", "ssl_certfile", Path("a")),
        ("--request-timeout-secs 20", "request_timeout_secs", 20.0),
        ("--health-check-interval-secs 3", "health_check_interval_secs", 3.0),
        ("--shutdown-grace-period-secs 3", "shutdown_grace_period_secs", 3.0),
        ("--max-concurrent-requests 9", "max_concurrent_requests", 9),
        ("--api-key k", "api_key", "k"),
    ],
)
def test_equivalent_flags_change_the_same_setting(argv: str, field: str, value: Any) -> None:
    config = parse_args(argv.split())
    assert setting(config, field) == value
    assert config.remarks == ()


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        ("--log-level warn", "log_level", "warning"),
        ("--log-dir logs", "log_dir", Path("logs")),
        ("--prometheus-port 29001", "metrics_port", 29001),
        ("--prometheus-host 127.0.0.1", "metrics_port", 29000),
        ("", "metrics_port", None),
        ("--prometheus-duration-buckets 0.1 1", "prometheus_duration_buckets", (0.1, 1.0)),
        ("--request-id-headers x-a x-b", "request_id_headers", ("x-a", "x-b")),
        ("--cors-allowed-origins http://a", "cors_allowed_origins", ("http://a",)),
        ("--enable-trace", "enable_trace", True),
    ],
)
def test_equivalent_observability_flags_change_the_same_setting(argv: str, field: str, value: Any) -> None:
    assert setting(parse_args(argv.split()), field) == value


def test_disable_circuit_breaker_sets_an_unreachable_threshold() -> None:
    assert parse_args(["--disable-circuit-breaker"]).config.health.cb_failure_threshold > 1 << 60


def test_model_path_sets_the_tokenizer_path(tmp_path: Path) -> None:
    for more, path in ([], str(tmp_path)), (["--tokenizer-path", "t"], "t"):
        config = parse_args(["--model-path", str(tmp_path), *more]).config
        assert config.tokenization.tokenizer_path == path
    hub = parse_args(["--model-path", "meta-llama/Llama-3"])
    assert hub.config.tokenization.tokenizer_path is None
    assert "meta-llama/Llama-3" in hub.remarks[0]


def test_sglang_routers_example_of_a_pd_launch_line_works() -> None:
    line = (
        "--pd-disaggregation --prefill http://prefill1:8000 9000 --prefill http://prefill2:8000 none "
        "--prefill http://prefill3:8000 --decode http://decode1:8001 --decode http://decode2:8001 "
        "--policy cache_aware --prefill-policy cache_aware --decode-policy power_of_two"
    )
    config = parse_args(line.split()).config
    assert [(one.role, one.bootstrap_port) for one in config.cluster.static] == [
        (Role.PREFILL, 9000),
        (Role.PREFILL, 8998),
        (Role.PREFILL, 8998),
        (Role.DECODE, None),
        (Role.DECODE, None),
    ]
    assert (config.routing.policy, config.routing.decode_policy) == ("prompt_tree", "power_of_two")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--backend openai", "supports sglang only"),
        ("--ca-cert-paths a b", "one file"),
        ("--cors-allowed-origins example.org", "SCHEME://"),
        ("--prometheus-port 70000", "not a port"),
        ("--prometheus-duration-buckets 2 1", "rise"),
    ],
)
def test_flags_refuse_impossible_values(argv: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_args(argv.split())


@pytest.mark.parametrize(
    ("argv", "suggestion"),
    [
        ("--cache-treshold 1", "--cache-threshold"),
        ("--polcy random", "--policy"),
        ("--log-levl=x", "--log-level"),
    ],
)
def test_unknown_flag_is_refused_with_a_suggestion(
    argv: str, suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_args(argv.split())
    assert f"did you mean {suggestion}?" in capsys.readouterr().err


def test_help_lists_only_this_routers_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    told = capsys.readouterr().out
    assert "--prompt" not in told
    assert "--cache-threshold" not in told
    assert "--log-format" in told


def test_flag_defaults_are_those_of_the_records() -> None:
    assert parse_args([]) == CommandLine(RouterConfig(), LogConfig(), ())


@pytest.mark.parametrize("name", ["observability.md", "from-sglang-router.md"])
def test_docs_name_existing_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    known = set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))
    known |= {line.split()[0] for line in LINES}
    text = (Path(__file__).parents[3] / "docs" / "guides" / name).read_text()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+(?![*a-z0-9-])", text))
    assert named
    assert named <= known
