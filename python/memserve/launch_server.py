"""Start one SGLang server as a prefill, decode or colocated instance of a MemServe cluster.

    python -m memserve.launch_server --role prefill --router 127.0.0.1:30001 --model-path DIR

Every flag that is not listed below is passed to SGLang unchanged (`sglang serve --help` lists them).
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from memserve.core.caching import CachingMode
from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import ConfigError
from memserve.core.flags import add_flags, from_namespace, setting
from memserve.core.hosts import bracketed, is_loopback
from memserve.core.ids import InstanceId, new_epoch
from memserve.engine.restarting import Restart, other_roles
from memserve.mempool.eviction import EvictionName
from memserve.transport.registry import MooncakeProtocol, TransportConfig, TransportName
from memserve.wire.link import ControlClient
from memserve.wire.messages import InstanceInfo, Role

if TYPE_CHECKING:
    from memserve.instance.pool_agent import PoolSettings

EXAMPLES = """\
examples:
  a pair on this machine, joined by the router's control address:
    python -m memserve.launch_router
    python -m memserve.launch_server --role prefill --router 127.0.0.1:30001 --model-path DIR
    python -m memserve.launch_server --role decode  --router 127.0.0.1:30001 --model-path DIR

  over several machines, with RDMA and a shared secret:
    python -m memserve.launch_server --role prefill --router 10.0.0.1:30001 --model-path DIR \\
        --host 10.0.0.2 --transfer mooncake --cluster-key-file cluster.key

  a machine without an accelerator that lends its memory:
    python -m memserve.launch_server --role memory --router 127.0.0.1:30001 --dram-gib 64
"""


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """MemServe's own settings of an instance; all others are SGLang's."""

    role: Role = setting(
        Role.COLOCATED,
        "role of this server: prefill, decode or colocated (both); a memory server serves no requests and "
        "lends its DRAM to the other servers",
    )
    router: str | None = setting(
        None, "control address of the router; without it the server runs alone", metavar="HOST:PORT"
    )
    transfer: TransportName = setting(
        "auto",
        "transport of KV between servers; auto selects mooncake for GPU memory; for host memory it selects "
        "local on one host, else mooncake over RDMA, else tcp",
    )
    mooncake_protocol: MooncakeProtocol | None = setting(
        None, "protocol of mooncake (default: rdma if the machine has an RDMA device, else tcp)"
    )
    caching: CachingMode = setting(
        CachingMode.FULL,
        "KV that the cluster keeps; the same value for every server. none: none; prefill: prefill keeps its "
        "KV; both: decode keeps its KV, too, and receives only the pages that it lacks; full: the KV that "
        "decode generates also returns to prefill",
    )
    dram_gib: float | None = setting(
        None,
        "GiB of DRAM for the memory pool, all ranks together; 0 disables the pool (default: twice the KV "
        "memory of the device, at most a quarter of the free memory)",
        metavar="GIB",
    )
    eviction_policy: EvictionName = setting(
        "lru",
        "which cached block the DRAM tier evicts first: lru: the least recently used; lfu: the least often "
        "used; cost: the cheapest to compute again, by its uses, its place in the prompt and its age",
    )
    cluster_key_file: Path | None = setting(
        None, "file with the shared secret of the cluster; required if traffic leaves this machine"
    )
    instance_id: str | None = setting(
        None,
        "name of this server in the cluster, the same after a restart (default: role, host and port)",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        if self.router is not None:
            host, _, port = self.router.rpartition(":")
            if not host or not port.isdigit():
                raise ConfigError(f"--router {self.router}: write HOST:PORT, as launch_router prints it")
        if self.dram_gib is not None and self.dram_gib < 0:
            raise ConfigError("--dram-gib cannot be negative")


def main(argv: list[str] | None = None) -> int:
    """Run until stopped. Returns the exit status: 0 after a stop, 2 if the user has to change something."""
    argv = sys.argv[1:] if argv is None else argv
    environ = dict(os.environ)
    try:
        config, sglang_argv = parse(argv)
        key = ClusterKey.read(config.cluster_key_file) if config.cluster_key_file else None
        if config.role is Role.MEMORY:
            lend(config, sglang_argv)
        else:
            serve(config, key, sglang_argv, Restart(argv, environ))
    except ConfigError as error:
        print(f"memserve.launch_server: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str]) -> tuple[InstanceConfig, list[str]]:
    """MemServe's settings, and the remaining arguments, which are SGLang's."""
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


def serve(config: InstanceConfig, key: ClusterKey | None, sglang_argv: list[str], restart: Restart) -> None:
    """Run SGLang in this process until it stops. If the router requested another role, restart as that role
    instead of returning."""
    from memserve.engine import server, server_flags
    from memserve.engine.load import LoadReader
    from memserve.engine.platform_detect import is_cpu_machine
    from memserve.engine.settings import EngineSettings
    from memserve.instance.registrar import Registrar
    from memserve.transport.mooncake import rdma_devices

    transfer, protocol = server_flags.resolve_transfer(
        config.transfer,
        config.mooncake_protocol,
        on_cpu=is_cpu_machine() or config.role is Role.COLOCATED,
        has_rdma=bool(rdma_devices()),
    )
    handoff = transport_config(config, transfer, protocol)
    settings = EngineSettings(handoff)
    has_pool = config.dram_gib != 0 and server_flags.needs_pool(config.role, config.caching)
    argv = [*(server_flags.pool_flags() if has_pool else []), *sglang_argv]
    server_args = server.prepare(config.role, config.caching, settings, argv)
    if key is None and config.role is not Role.COLOCATED and not is_loopback(server_args.host):
        raise ConfigError(
            f"--host {server_args.host} lets KV leave this machine: give every instance --cluster-key-file"
        )
    info = describe(config, server_args, server.reachable_host(server_args.host))
    roles = other_roles(config.role, sglang_argv, server_args.nnodes)
    info = msgspec.structs.replace(info, roles=roles)
    handoff = replace(handoff, host=urlsplit(info.url).hostname or "")
    pool = pool_settings(config, info, replace(handoff, transport=config.transfer)) if has_pool else None
    EngineSettings(handoff, pool).export()
    registrar = None
    if config.router is not None:
        client = ControlClient(config.router, key=key)
        port = server_args.port
        registrar = Registrar(client, info, LoadReader(), lambda role: restart.want(role, port))
    try:
        server.run(server_args, registrar)
    finally:
        restart.run_if_wanted()


def lend(config: InstanceConfig, argv: list[str]) -> None:
    """Lend this machine's DRAM until stopped, without a model and without SGLang."""
    from memserve.instance import memory_server
    from memserve.transport.mooncake import rdma_devices

    host, port = memory_server.read_flags(argv)
    if config.router is None:
        raise ConfigError("--role memory needs --router: without it no server finds the memory")
    if config.dram_gib is None:
        raise ConfigError("--role memory needs --dram-gib: the amount of memory to lend")
    name = config.instance_id or f"{config.role}-{socket.gethostname()}-{port or os.getpid()}"
    protocol = config.mooncake_protocol or ("rdma" if rdma_devices() else "tcp")
    memory_server.run(
        memory_server.MemoryConfig(
            instance_id=InstanceId(name),
            router=config.router,
            dram_bytes=int(config.dram_gib * 2**30),
            transport=replace(transport_config(config, config.transfer, protocol), host=host),
            port=port,
            caching=config.caching,
            eviction=config.eviction_policy,
        )
    )


def transport_config(
    config: InstanceConfig, transport: TransportName, protocol: MooncakeProtocol
) -> TransportConfig:
    """How this instance is reached; the host is still to be named."""
    key_file = str(config.cluster_key_file.resolve()) if config.cluster_key_file else None
    return TransportConfig(transport, cluster_key_file=key_file, mooncake_protocol=protocol)


def describe(config: InstanceConfig, server_args: Any, host: str) -> InstanceInfo:
    """The registration of this instance at the router; other machines reach it at `host`."""
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
        caching=config.caching,
    )


def pool_settings(config: InstanceConfig, info: InstanceInfo, transport: TransportConfig) -> PoolSettings:
    """The settings of the memory pools of this server's ranks."""
    from memserve.instance.pool_agent import PoolSettings

    return PoolSettings(
        instance_id=info.instance_id,
        role=config.role,
        caching=config.caching,
        dram_bytes=None if config.dram_gib is None else int(config.dram_gib * 2**30),
        router=config.router,
        bootstrap=f"{transport.host}:{info.bootstrap_port}" if info.bootstrap_port is not None else "",
        transport=transport,
        eviction=config.eviction_policy,
    )


if __name__ == "__main__":
    sys.exit(main())
