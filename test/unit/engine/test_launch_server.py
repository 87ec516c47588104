"""User errors of launch_server: one clear line, exit status 2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from memserve.core.caching import CachingMode
from memserve.core.errors import ConfigError
from memserve.core.ids import Epoch, InstanceId
from memserve.engine.server import prepare
from memserve.engine.settings import EngineSettings
from memserve.instance import memory_server
from memserve.instance.memory_server import MemoryConfig
from memserve.launch_server import lend, main, parse, pool_settings
from memserve.mempool.eviction import EVICTION_POLICIES
from memserve.transport.registry import TransportConfig
from memserve.wire.messages import InstanceInfo, Role


@pytest.fixture(autouse=True)
def _environment_as_it_was() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "--model-path is missing"),
        (["--model-path", "/no/such/place"], "/no/such/place: no such directory"),
        (["--model-path", "./nothing"], "no such directory"),
        (["--router", "30001", "--model-path", "x/y"], "--router 30001: write HOST:PORT"),
        (["--cluster-key-file", "/no/key", "--model-path", "x/y"], "cluster key file /no/key"),
    ],
)
def test_launcher_reports_a_user_error_in_one_line(
    argv: list[str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    said = capfd.readouterr().err
    assert reason in said
    assert len(said.strip().splitlines()) == 1


def test_launcher_refuses_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        prepare(Role.COLOCATED, CachingMode.FULL, SETTINGS, ["--model-path", str(tmp_path)])


@pytest.mark.parametrize("flags", [["--no-such-flag", "3"], ["--page-size", "many"]])
def test_launcher_reports_a_flag_that_sglang_refuses_in_one_line(tiny_model: Path, flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=flags[0]) as caught:
        prepare(Role.COLOCATED, CachingMode.FULL, SETTINGS, ["--model-path", str(tiny_model), *flags])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", EVICTION_POLICIES)
def test_eviction_policy_flag_reaches_servers_and_memory_servers(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--eviction-policy", policy, "--router", "127.0.0.1:1", "--dram-gib", "1"]
    config, _ = parse(["--role", "prefill", *flags])
    info = InstanceInfo(InstanceId("p"), Epoch(1), Role.PREFILL, "http://127.0.0.1:2", 3, CachingMode.FULL)
    assert pool_settings(config, info, TransportConfig()).eviction == policy
    lent: list[MemoryConfig] = []
    monkeypatch.setattr(memory_server, "run", lent.append)
    config, _ = parse(["--role", "memory", *flags])
    lend(config, [])
    assert lent[0].eviction == policy


def test_launcher_passes_sglang_flags_through() -> None:
    config, rest = parse(["--role", "decode", "--tp", "2", "--router", "h:1", "--schedule-policy", "lpm"])
    assert config.role is Role.DECODE
    assert config.router == "h:1"
    assert rest == ["--tp", "2", "--schedule-policy", "lpm"]


SETTINGS = EngineSettings(TransportConfig())
