"""The SGLang flags a role and a machine need, put in front of the user's own, which win.

Pure: everything comes in as arguments, so each case is a row in a test. Knows SGLang's flags by
name and nothing else of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from memserve.core.caching import CachingMode
from memserve.core.errors import ConfigError
from memserve.engine.platform_detect import CPU_ATTENTION
from memserve.transport.registry import MooncakeProtocol, TransportName
from memserve.wire.messages import Role

KV_FRACTION_ON_CPU = 0.7
"""Of the memory free at start, for weights and KV. Not less: SGLang takes for its own weights what other
servers that start meanwhile use, and would find no room. `KV_TOKENS_ON_CPU` bounds what it is used for."""
KV_TOKENS_ON_CPU = 65536
"""At most; SGLang touches every byte of its KV at start, gigabytes of it for a small model."""
HBM_PUBLISHER = "memserve"
"""What SGLang is told to call our publisher of its cache's events."""
MAX_RUNNING_REQUESTS_ON_CPU = 32
PAGE_TOKENS_ON_CPU = 16


@dataclass(frozen=True, slots=True)
class FreePorts:
    """Ports the system has just offered, used where the user named none."""

    http: int
    bootstrap: int


def role_flags(role: Role, caching: CachingMode, ports: FreePorts) -> list[str]:
    """Flags that make an SGLang server play `role` and keep what `caching` says, on any device."""
    flags = ["--port", str(ports.http), "--enable-cache-report"]
    keeps = caching.decode_keeps if role is Role.DECODE else caching.prefill_keeps
    if not keeps:
        flags.append("--disable-radix-cache")
    if role is Role.COLOCATED:
        return flags
    flags += ["--disaggregation-mode", role.value, "--disaggregation-transfer-backend", "mooncake"]
    if role is Role.PREFILL:
        return [*flags, "--disaggregation-bootstrap-port", str(ports.bootstrap)]
    if keeps:
        flags.append("--disaggregation-decode-enable-radix-cache")
    return flags


def cpu_flags(role: Role) -> list[str]:
    """What SGLang has to be told on a machine without a GPU; on CUDA its own defaults stand."""
    flags = [
        *("--device", "cpu"),
        *("--attention-backend", CPU_ATTENTION),
        *("--sampling-backend", "pytorch"),
        *("--grammar-backend", "xgrammar"),
        *("--dtype", "float32"),
        *("--page-size", str(PAGE_TOKENS_ON_CPU)),
        *("--mem-fraction-static", str(KV_FRACTION_ON_CPU)),
        *("--max-total-tokens", str(KV_TOKENS_ON_CPU)),
        *("--max-running-requests", str(MAX_RUNNING_REQUESTS_ON_CPU)),
        "--disable-overlap-schedule",
        "--disable-cuda-graph",
        "--sleep-on-idle",
    ]
    if role is Role.DECODE:
        flags += ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
    return flags


def needs_pool(role: Role, caching: CachingMode) -> bool:
    """Whether a DRAM tier is of use: to decode, which never loads from it, only to send KV home."""
    return caching.returns if role is Role.DECODE else caching.prefill_keeps


def pool_flags() -> list[str]:
    """Flags that put a memory pool under the radix cache of every rank, and have it told what is in HBM."""
    linker = {"linker_module_path": "memserve.engine.linker", "linker": "MemPoolLinker"}
    # No endpoint: SGLang would advertise it as one to subscribe to.
    events = {"publisher": HBM_PUBLISHER, "endpoint": "", "format": "dynamo"}
    return [
        "--enable-unified-cache-external-linker",
        *("--unified-cache-external-linker-backend", "dynamic"),
        *("--unified-cache-external-linker-config", json.dumps(linker)),
        *("--kv-events-config", json.dumps(events)),
    ]


def resolve_transfer(
    transfer: TransportName, protocol: MooncakeProtocol | None, *, on_cpu: bool, has_rdma: bool
) -> tuple[TransportName, MooncakeProtocol]:
    """What moves KV on this machine, and what mooncake runs over, where the user left it open.

    Host memory has `auto` of its own: the ends of each transfer choose. GPU memory needs mooncake.
    Raises ConfigError for a transport that cannot reach the KV.
    """
    if not on_cpu:
        if transfer in ("local", "tcp"):
            raise ConfigError(
                f"--transfer {transfer} moves host memory only, and KV is on the GPU: use mooncake"
            )
        transfer = "mooncake"
    return transfer, protocol or ("rdma" if has_rdma else "tcp")


def cpu_threads(role: Role, num_cores: int) -> int:
    """Compute threads of one server: half the cores for one of a pair, all of them alone."""
    return num_cores if role is Role.COLOCATED else max(1, num_cores // 2)


def cpu_environment(role: Role, num_cores: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables to set for a CPU server that the user has not set."""
    wanted = {"OMP_NUM_THREADS": str(cpu_threads(role, num_cores))}
    return {name: value for name, value in wanted.items() if name not in environ}
