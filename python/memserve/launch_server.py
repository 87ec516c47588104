"""Start one SGLang server as a prefill, decode or colocated instance of a MemServe cluster.

    python -m memserve.launch_server --role prefill --router 127.0.0.1:30001 --model-path DIR

Every flag that is not listed below goes to SGLang untouched (`sglang serve --help` lists them).
"""

from __future__ import annotations

import argparse
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import ConfigError
from memserve.core.flags import add_flags, from_namespace, setting
from memserve.core.hosts import bracketed, is_loopback
from memserve.core.ids import InstanceId, new_epoch
from memserve.wire.link import ControlClient
from memserve.wire.messages import InstanceInfo, Role

EXAMPLES = """\
examples:
  a pair on this machine, joined by the router's control address:
    python -m memserve.launch_router
    python -m memserve.launch_server --role prefill --router 127.0.0.1:30001 --model-path DIR
    python -m memserve.launch_server --role decode  --router 127.0.0.1:30001 --model-path DIR

  over several machines, with RDMA and a shared secret:
    python -m memserve.launch_server --role prefill --router 10.0.0.1:30001 --model-path DIR \\
        --host 10.0.0.2 --transfer mooncake --cluster-key-file cluster.key
"""


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """What MemServe itself has to know of an instance; the rest is SGLang's."""

    role: Role = setting(Role.COLOCATED, "what this server does for a request: prefill, decode or colocated")
    router: str | None = setting(
        None, "the router's control address; without it the server runs alone", metavar="HOST:PORT"
    )
    transfer: Literal["auto", "local", "tcp", "mooncake"] = setting(
        "auto",
        "how KV travels between prefill and decode; auto takes mooncake for GPU memory, for host "
        "memory local on one host, else mooncake over RDMA, else tcp",
    )
    mooncake_protocol: Literal["rdma", "tcp"] | None = setting(
        None, "what mooncake runs over (default: rdma where there is a device for it, else tcp)"
    )
    dram_gib: float = setting(
        0.0,
        "GiB of DRAM that keep what the radix cache evicts, all ranks together; 0 for none",
        metavar="GIB",
    )
    cluster_key_file: Path | None = setting(
        None, "file with the cluster's shared secret; needed as soon as traffic leaves this machine"
    )
    instance_id: str | None = setting(
        None,
        "this server's name in the cluster, kept over restarts (default: role, host and port)",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        if self.router is not None:
            host, _, port = self.router.rpartition(":")
            if not host or not port.isdigit():
                raise ConfigError(f"--router {self.router}: write HOST:PORT, as launch_router prints it")
        if self.dram_gib < 0:
            raise ConfigError("--dram-gib cannot be negative")


def main(argv: list[str] | None = None) -> int:
    """Run until stopped. Returns the exit status: 0 stopped, 2 something the user must change."""
    try:
        config, sglang_argv = parse(sys.argv[1:] if argv is None else argv)
        key = ClusterKey.read(config.cluster_key_file) if config.cluster_key_file else None
        serve(config, key, sglang_argv)
    except ConfigError as error:
        print(f"memserve.launch_server: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str]) -> tuple[InstanceConfig, list[str]]:
    """Our settings, and the arguments left for SGLang."""
    parser = argparse.ArgumentParser(
        prog="python -m memserve.launch_server",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, InstanceConfig)
    namespace, sglang_argv = parser.parse_known_args(argv)
    return from_namespace(InstanceConfig, namespace), sglang_argv


def serve(config: InstanceConfig, key: ClusterKey | None, sglang_argv: list[str]) -> None:
    """Start SGLang in this process and return when it has stopped."""
    from memserve.disagg.registrar import Registrar
    from memserve.engine import server, server_flags
    from memserve.engine.machine import is_cpu_machine
    from memserve.engine.plugin import EngineSettings
    from memserve.transport.mooncake import rdma_devices

    transfer, protocol = server_flags.resolve_transfer(
        config.transfer,
        config.mooncake_protocol,
        on_cpu=is_cpu_machine() or config.role is Role.COLOCATED,
        has_rdma=bool(rdma_devices()),
    )
    argv = [*server_flags.dram_flags(config.role, config.dram_gib), *sglang_argv]
    key_file = str(config.cluster_key_file.resolve()) if config.cluster_key_file else None
    server_args = server.prepare(config.role, EngineSettings(transfer, protocol, key_file), argv)
    if key is None and config.role is not Role.COLOCATED and not is_loopback(server_args.host):
        raise ConfigError(
            f"--host {server_args.host} lets KV leave this machine: give every instance --cluster-key-file"
        )
    registrar = None
    if config.router is not None:
        info = describe(config, server_args, server.reachable_host(server_args.host))
        registrar = Registrar(ControlClient(config.router, key=key), info)
    server.run(server_args, registrar)


def describe(config: InstanceConfig, server_args: Any, host: str) -> InstanceInfo:
    """What the router is told of this instance, which others reach at `host`."""
    scheme = "https" if server_args.ssl_certfile else "http"
    url = f"{scheme}://{bracketed(host)}:{server_args.port}"
    name = config.instance_id or f"{config.role}-{socket.gethostname()}-{server_args.port}"
    is_prefill = config.role is Role.PREFILL
    return InstanceInfo(
        instance_id=InstanceId(name),
        epoch=new_epoch(),
        role=config.role,
        url=url,
        bootstrap_port=server_args.disaggregation_bootstrap_port if is_prefill else None,
    )


if __name__ == "__main__":
    sys.exit(main())
