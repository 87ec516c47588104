from pathlib import Path

import pytest

from memserve.core.errors import ConfigError
from memserve.core.ids import new_epoch
from memserve.transport.base import Transport
from memserve.transport.local.transport import LocalTransport, host_identity
from memserve.transport.mooncake import MooncakeTransport, rdma_devices
from memserve.transport.registry import TransportConfig, TransportName, open_transports, ranked


def opened(name: TransportName = "auto", **options: str) -> tuple[Transport, ...]:
    return open_transports(TransportConfig(name, **options), None, new_epoch())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("offered", "expected"),
    [
        ({"local": "{here}/1/2", "tcp": "h:1"}, ["local", "tcp"]),
        ({"local": "another boot/4026531836/1/2", "tcp": "h:1"}, ["tcp"]),
        ({"tcp": "h:1", "mooncake": "h:2/3"}, ["tcp"]),
        ({"mooncake": "h:2/3"}, []),
        ({}, []),
    ],
)
def test_ranked_lists_the_transports_of_both_ends_best_first(
    offered: dict[str, str], expected: list[str]
) -> None:
    own = opened("auto")
    there = {name: address.format(here=host_identity()) for name, address in offered.items()}
    assert [transport.name for transport in ranked(own, there)] == expected
    for transport in own:
        transport.close()


def test_auto_offers_tcp_only_if_the_host_forbids_local_copies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(self: LocalTransport) -> None:
        raise ConfigError("this host forbids process_vm_readv: Operation not permitted")

    monkeypatch.setattr(LocalTransport, "_probe", forbidden)
    (only,) = opened("auto")
    assert only.name == "tcp"
    assert [record.getMessage() for record in caplog.records] == [
        "local transport not offered, tcp takes over: "
        "this host forbids process_vm_readv: Operation not permitted"
    ]
    only.close()
    with pytest.raises(ConfigError, match="forbids"):
        opened("local")


def test_rdma_is_refused_where_there_is_no_device(tmp_path: Path) -> None:
    assert rdma_devices(tmp_path / "missing") == ()
    assert rdma_devices(tmp_path) == ()
    (tmp_path / "mlx5_0").mkdir()
    assert rdma_devices(tmp_path) == ("mlx5_0",)
    if rdma_devices():
        pytest.skip("this machine has RDMA devices")
    with pytest.raises(ConfigError, match="RDMA device"):
        MooncakeTransport(new_epoch(), "127.0.0.1", "rdma")
