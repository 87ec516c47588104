"""The SGLang flags of a role and a machine, and the precedence of the user's flags."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from memserve.core.caching import CachingMode
from memserve.core.errors import ConfigError
from memserve.engine.server_flags import (
    HBM_PUBLISHER,
    FreePorts,
    cpu_environment,
    cpu_flags,
    cpu_threads,
    guard_environment,
    needs_pool,
    pool_flags,
    resolve_transfer,
    role_flags,
)
from memserve.wire.messages import Role

BOOTSTRAP, DECODE_CACHE = "--disaggregation-bootstrap-port", "--disaggregation-decode-enable-radix-cache"
NO_CACHE, DISAGGREGATION = "--disable-radix-cache", "--disaggregation-mode"
SERVING = (Role.PREFILL, Role.DECODE, Role.COLOCATED)
PORTS = FreePorts(http=1234, bootstrap=5678)


@pytest.mark.parametrize(
    ("role", "caching", "wanted", "unwanted"),
    [
        (Role.PREFILL, "none", [BOOTSTRAP, "5678", NO_CACHE], [DECODE_CACHE]),
        (Role.PREFILL, "prefill", [BOOTSTRAP, "5678"], [DECODE_CACHE, NO_CACHE]),
        (Role.PREFILL, "full", [BOOTSTRAP, "5678"], [DECODE_CACHE, NO_CACHE]),
        (Role.DECODE, "none", [NO_CACHE], [BOOTSTRAP, DECODE_CACHE]),
        (Role.DECODE, "prefill", [NO_CACHE], [BOOTSTRAP, DECODE_CACHE]),
        (Role.DECODE, "both", [DECODE_CACHE], [BOOTSTRAP, NO_CACHE]),
        (Role.DECODE, "full", [DECODE_CACHE], [BOOTSTRAP, NO_CACHE]),
        (Role.COLOCATED, "none", [NO_CACHE], [DISAGGREGATION]),
        (Role.COLOCATED, "full", [], [DISAGGREGATION, NO_CACHE]),
    ],
)
def test_server_flags_follow_role_and_caching_mode(
    role: Role, caching: str, wanted: list[str], unwanted: list[str]
) -> None:
    flags = role_flags(role, CachingMode(caching), PORTS)
    assert flags[:2] == ["--port", "1234"]
    assert set(wanted) <= set(flags)
    assert not set(unwanted) & set(flags)
    if role is not Role.COLOCATED:
        assert flags[flags.index("--disaggregation-mode") + 1] == role


def test_server_flags_give_only_decode_a_retraction_backup_on_the_cpu() -> None:
    assert "--disaggregation-decode-retraction-backup" in cpu_flags(Role.DECODE)
    assert "--disaggregation-decode-retraction-backup" not in cpu_flags(Role.PREFILL)


def test_sglang_accepts_every_server_flag_and_user_flags_win() -> None:
    import argparse

    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    parser = argparse.ArgumentParser(exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    for role, caching in itertools.product(SERVING, CachingMode):
        flags = [
            *role_flags(role, caching, PORTS),
            *(pool_flags() if needs_pool(role, caching) else []),
            *cpu_flags(role),
            "--model-path",
            "x",
            "--page-size",
            "64",
            "--port",
            "99",
        ]
        parsed = parser.parse_args(flags)
        assert (parsed.page_size, parsed.port, parsed.device) == (64, 99, "cpu")
    for wanted in ("", '{"publisher": "zmq"}'):
        flags = [*pool_flags(), "--model-path", "x", "--kv-events-config", wanted]
        assert parser.parse_args(flags).kv_events_config == wanted


def test_hbm_events_go_to_our_publisher_with_namespaces_and_without_an_endpoint() -> None:
    flags = pool_flags()
    wanted = {"publisher": HBM_PUBLISHER, "endpoint": "", "format": "dynamo"}
    assert json.loads(flags[flags.index("--kv-events-config") + 1]) == wanted


@pytest.mark.parametrize(
    ("transfer", "protocol", "on_cpu", "has_rdma", "resolved"),
    [
        ("auto", None, True, False, ("auto", "tcp")),
        ("auto", None, True, True, ("auto", "rdma")),
        ("tcp", None, True, True, ("tcp", "rdma")),
        ("auto", None, False, True, ("mooncake", "rdma")),
        ("auto", None, False, False, ("mooncake", "tcp")),
        ("mooncake", "tcp", False, True, ("mooncake", "tcp")),
        ("mooncake", "rdma", True, False, ("mooncake", "rdma")),
    ],
)
def test_kv_in_gpu_memory_travels_by_mooncake(
    transfer: Any, protocol: Any, on_cpu: bool, has_rdma: bool, resolved: tuple[str, str]
) -> None:
    assert resolve_transfer(transfer, protocol, on_cpu=on_cpu, has_rdma=has_rdma) == resolved


@pytest.mark.parametrize("transfer", ["local", "tcp"])
def test_server_flags_refuse_a_transport_that_cannot_reach_gpu_memory(transfer: Any) -> None:
    with pytest.raises(ConfigError, match="GPU"):
        resolve_transfer(transfer, None, on_cpu=False, has_rdma=True)


@pytest.mark.parametrize(
    ("role", "cores", "threads"),
    [(Role.PREFILL, 2, 1), (Role.DECODE, 8, 4), (Role.PREFILL, 1, 1), (Role.COLOCATED, 6, 6)],
)
def test_servers_of_a_pair_share_the_cores(role: Role, cores: int, threads: int) -> None:
    assert cpu_threads(role, cores) == threads
    assert cpu_environment(role, cores, [], {})["OMP_NUM_THREADS"] == str(threads)
    assert "OMP_NUM_THREADS" not in cpu_environment(role, cores, [], {"OMP_NUM_THREADS": "7"})


def test_a_cpu_server_compiles_nothing_unless_the_user_asks_for_it() -> None:
    assert cpu_environment(Role.DECODE, 2, [], {})["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in cpu_environment(Role.DECODE, 2, ["--enable-torch-compile"], {})
    assert "TORCHDYNAMO_DISABLE" not in cpu_environment(Role.DECODE, 2, [], {"TORCHDYNAMO_DISABLE": "0"})


def test_guards_in_the_environment_yield_to_the_users_values() -> None:
    assert guard_environment({})["SGLANG_SANITIZE_NAN_LOGITS"] == "1"
    assert "SGLANG_SANITIZE_NAN_LOGITS" not in guard_environment({"SGLANG_SANITIZE_NAN_LOGITS": "0"})


@pytest.mark.parametrize(
    ("role", "modes"),
    [
        (Role.PREFILL, ["prefill", "both", "full"]),
        (Role.COLOCATED, ["prefill", "both", "full"]),
        (
            Role.DECODE,
            ["full"],
        ),  # SGLang's decode never loads from DRAM: its pool only returns KV to prefill.
    ],
)
def test_server_flags_add_a_pool_only_for_roles_that_use_it(role: Role, modes: list[str]) -> None:
    assert [str(mode) for mode in CachingMode if needs_pool(role, mode)] == modes
