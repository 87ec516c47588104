"""The SGLang flags that a role and a machine need. They precede the user's flags, which win.

Pure: all input comes as arguments, so each case is a row in a test. Of SGLang it knows the names of flags
only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memserve.core.caching import CachingMode
from memserve.core.errors import ConfigError
from memserve.engine.platform_detect import CPU_ATTENTION
from memserve.transport.registry import MooncakeProtocol, TransportName
from memserve.wire.messages import Role

KV_FRACTION_ON_CPU = 0.7
"""Share of the memory that is free at start, for weights and KV. Not less: SGLang attributes to its own
weights the memory that other starting servers take, and would find no room. `KV_TOKENS_ON_CPU` bounds the
use."""
KV_TOKENS_ON_CPU = 65536
"""Upper bound: SGLang touches every byte of its KV at start, gigabytes for a small model."""
HBM_PUBLISHER = "memserve"
"""The name of our publisher of SGLang's cache events."""


@dataclass(frozen=True, slots=True)
class FreePorts:
    """Free ports, used if the user names none."""

    http: int
    bootstrap: int


def role_flags(role: Role, caching: CachingMode, ports: FreePorts) -> list[str]:
    """Flags that give an SGLang server the role `role` and the caching mode `caching`, on any device."""
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
    """Flags for a machine without a GPU; with CUDA, SGLang's own defaults apply."""
    flags = [
        *("--device", "cpu"),
        *("--attention-backend", CPU_ATTENTION),
        *("--sampling-backend", "pytorch"),
        *("--grammar-backend", "xgrammar"),
        *("--dtype", "float32"),
        *("--page-size", "16"),
        *("--mem-fraction-static", str(KV_FRACTION_ON_CPU)),
        *("--max-total-tokens", str(KV_TOKENS_ON_CPU)),
        *("--max-running-requests", "32"),
        "--disable-overlap-schedule",
        "--disable-cuda-graph",
        "--sleep-on-idle",
    ]
    if role is Role.DECODE:
        flags += ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
    return flags


def needs_pool(role: Role, caching: CachingMode) -> bool:
    """Whether the role needs a DRAM tier. Decode needs it only to return KV to prefill, never to load."""
    return caching.returns if role is Role.DECODE else caching.prefill_keeps


def pool_flags() -> list[str]:
    """Flags that put a memory pool under the radix cache of every rank, and report HBM events to it."""
    linker = {"linker_module_path": "memserve.engine.linker", "linker": "MemPoolLinker"}
    # No endpoint: SGLang would advertise it to subscribers.
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
    """The transport of this machine and the protocol of mooncake, with unset values resolved.

    For host memory `auto` stays: the two ends of each transfer choose. GPU memory needs mooncake.
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
    """Compute threads of one server: all cores for a colocated server, half of them for one of a pair."""
    return num_cores if role is Role.COLOCATED else max(1, num_cores // 2)


def guard_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep one request from ending a server or stopping it, without those the user has set.

    Sanitizing makes a row of logits without a possible token (a grammar that allows none) one that can be
    sampled: the request then ends with an error, where the sampler would raise or, on CUDA, assert.
    A grammar that is not compiled within some seconds is refused: SGLang polls it every 5 ms.
    """
    wanted = {"SGLANG_SANITIZE_NAN_LOGITS": "1", "SGLANG_GRAMMAR_MAX_POLL_ITERATIONS": "3000"}
    return {name: value for name, value in wanted.items() if name not in environ}


def cpu_environment(
    role: Role, num_cores: int, argv: Sequence[str], environ: Mapping[str, str]
) -> dict[str, str]:
    """Environment variables for a CPU server, without those that the user has set.

    Torch's compiler is off unless `argv` asks for it: it would stop the scheduler for half a minute at the
    first request with a repetition penalty.
    """
    wanted = {"OMP_NUM_THREADS": str(cpu_threads(role, num_cores))}
    if "--enable-torch-compile" not in argv:
        wanted["TORCHDYNAMO_DISABLE"] = "1"
    return {name: value for name, value in wanted.items() if name not in environ}
