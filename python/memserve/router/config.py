"""What the router is told at start, and the flags it is told with. Knows no sockets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from memserve.core.errors import ConfigError
from memserve.core.flags import add_flags, from_namespace, setting
from memserve.router.cluster.discovery.config import DiscoveryConfig, add_discovery_flags, read_discovery
from memserve.router.cluster.discovery.static import DEFAULT_BOOTSTRAP_PORT, static_server
from memserve.router.compat import POLICY_SYNONYMS, CompatParser, settle
from memserve.router.observability.settings import ObservabilityConfig
from memserve.router.tokenization.prompts import RoutingKeys
from memserve.scheduling.policies import describe_policies, find_policy
from memserve.wire.messages import InstanceInfo, Role

DEFAULT_PORT = 30000

EXAMPLES = """\
examples:
  # MemServe servers register themselves:
  python -m memserve.launch_router
  python -m memserve.launch_server --role prefill --router 127.0.0.1:30001 --model-path MODEL
  python -m memserve.launch_server --role decode  --router 127.0.0.1:30001 --model-path MODEL

  # stock SGLang servers are named:
  python -m memserve.launch_router --prefill http://127.0.0.1:30100 8998 --decode http://127.0.0.1:30200
  python -m memserve.launch_router --worker-urls http://127.0.0.1:30300 http://127.0.0.1:30400

  # or found among Kubernetes' pods, by their labels:
  python -m memserve.launch_router --service-discovery --selector app=sglang --service-discovery-port 8000

  # several machines: the cluster key admits instances
  python -m memserve.launch_router --host 10.0.0.1 --cluster-key-file cluster.key
"""


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Everything the router can be told. Checked when built."""

    host: str = setting("127.0.0.1", "address to listen on, for HTTP and for the control plane")
    port: int = setting(DEFAULT_PORT, "HTTP port; 0 picks a free one")
    control_port: int | None = setting(
        None, "port where instances register; the HTTP port + 1 unless given, 0 picks a free one"
    )
    cluster_key_file: Path | None = setting(
        None, "secret shared by the cluster; needed as soon as --host is not this machine itself"
    )
    api_keys_file: Path | None = setting(
        None,
        "lines of KEY TENANT [rps=N] [tps=N] [weight=N]: requests need one of the keys, tenants share no "
        "cached blocks, and have these requests and tokens per second and this share; read again when it "
        "changes",
    )
    api_key: str | None = setting(
        None,
        "the key that servers want, and clients need unless there is --api-keys-file; others on this "
        "machine can see it in the list of processes",
        metavar="KEY",
        is_secret=True,
    )
    admin_api_key_file: Path | None = setting(
        None,
        "lines of KEY: whoever has one sees and changes workers; without it everybody does on loopback, "
        "who has --api-key if there is one, and nobody else",
    )
    ssl_certfile: Path | None = setting(None, "PEM file with the router's certificate: HTTP becomes HTTPS")
    ssl_keyfile: Path | None = setting(None, "PEM file with its key")
    ssl_ca_certs: Path | None = setting(
        None, "PEM file with the authorities that https servers are verified by, instead of the system's"
    )
    ssl_client_certfile: Path | None = setting(
        None, "PEM file with the certificate that the router shows to https servers"
    )
    ssl_client_keyfile: Path | None = setting(None, "PEM file with its key, if that is another file")
    max_concurrent_requests: int = setting(
        -1,
        "how many requests run at once; more wait their turn, fairly by tenant; less than 1: no limit",
    )
    queue_size: int = setting(100, "how many may wait; more are answered with 429")
    queue_timeout_secs: float = setting(
        60.0, "how long one may wait; then it is answered with 503 and told when to come again"
    )
    rate_limit_tokens_per_second: float | None = setting(
        None, "how many requests may begin per second, all together; more are answered with 429", metavar="N"
    )
    max_buffered_mib: int | None = setting(
        None,
        "memory that requests may take, all together, their bodies and what is made of them; more are "
        "answered with 503; a quarter of the machine's unless given",
    )
    policy: str = setting(
        "prompt_tree",
        f"how instances are chosen: {describe_policies()}; MODULE:FUNCTION: a policy of yours",
        synonyms=POLICY_SYNONYMS,
        metavar="NAME",
    )
    prefill_policy: str | None = setting(
        None,
        "the policy for prefill and colocated instances, if another",
        synonyms=POLICY_SYNONYMS,
        metavar="NAME",
    )
    decode_policy: str | None = setting(
        None, "the policy for decode instances, if another", synonyms=POLICY_SYNONYMS, metavar="NAME"
    )
    fetch: Literal["auto", "never"] = setting(
        "auto", "whether a prefill fetches history from a better holder before it gets a request"
    )
    tokenizer_path: str | None = setting(
        None,
        "model directory with the tokenizer for requests; the instances' own --model-path unless given; "
        "none: leave it to them, and place requests by load and session",
        metavar="DIR",
    )
    routing_keys: RoutingKeys = setting(
        "auto",
        "how a prompt is looked up in the prompt tree; tokens: exactly, and its ids go on; text: by "
        "hashes of its text, which costs a fraction, and servers tell which tokens they were; auto: tokens "
        "where the tokenizer is known, else text",
    )
    costs: str = setting(
        "auto",
        "what work costs to begin with: gpu, cpu, or a file that benchmark/fit_cost_model.py wrote; "
        "auto: gpu or cpu, whichever the servers run on",
    )
    tree_budget_mib: int = setting(1024, "memory that the prompt tree may take; 256 bytes a block")
    tree_audit_secs: float = setting(
        60.0, "how often the tree is compared with what an instance really holds"
    )
    learnt_ttl_secs: float = setting(
        600.0, "how long a server that reports nothing is believed to keep what it was sent"
    )
    request_timeout_secs: float = setting(1800.0, "a request that takes longer is ended with an error")
    retry_max_retries: int = setting(
        3, "how often a request that an instance lost or failed (5xx) is done again; 0: never"
    )
    retry_initial_backoff_ms: int = setting(
        50, "wait before the first of them; twice as long before each next one", metavar="MS"
    )
    retry_max_backoff_ms: int = setting(2000, "but no longer than this", metavar="MS")
    resume: Literal["auto", "never"] = setting(
        "auto",
        "whether a stream that an instance leaves is continued by another one, where that gives the same "
        "text: greedy requests, and all of them with --enable-deterministic-inference",
    )
    cb_failure_threshold: int = setting(
        5, "an instance that fails so many requests in a row gets none while there are others"
    )
    cb_timeout_secs: float = setting(2.0, "how long, before it gets one more to try it")
    drain_evacuate_secs: float = setting(
        10.0, "how long an instance that is drained may send the KV it holds to others; 0: it keeps it"
    )
    shutdown_grace_period_secs: float = setting(10.0, "how long running requests may finish after SIGTERM")
    health_check_interval_secs: float = setting(10.0, "how often a server that was named by URL is checked")
    heartbeat_secs: float = setting(2.0, "how often a registered instance says that it lives")
    stuck_secs: float = setting(
        15.0, "an instance whose scheduler makes no step for so long gets no requests while there are others"
    )
    max_body_bytes: int = setting(64 << 20, "the largest request body; more is answered with 413")
    max_connections: int | None = setting(
        None, "how many clients may be connected; three quarters of the open files it may have unless given"
    )
    client_header_timeout_secs: float = setting(
        30.0, "how long a client may take to send the head of a request"
    )
    client_stall_timeout_secs: float = setting(
        60.0, "how long a client may send nothing of a body, or read nothing of its answer"
    )
    observe: ObservabilityConfig = field(default_factory=ObservabilityConfig)
    remarks: tuple[str, ...] = ()
    """What is to be logged of the flags."""
    static: tuple[InstanceInfo, ...] = ()
    """Servers named by URL."""
    discovery: DiscoveryConfig | None = None
    """Servers found among Kubernetes' pods."""

    def __post_init__(self) -> None:
        for name in ("port", "control_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port < 65536:
                raise ConfigError(f"--{name.replace('_', '-')} {port} is not a port")
        for name in (
            "request_timeout_secs",
            "cb_timeout_secs",
            "health_check_interval_secs",
            "heartbeat_secs",
            "stuck_secs",
            "tree_audit_secs",
            "learnt_ttl_secs",
            "queue_timeout_secs",
            "client_header_timeout_secs",
            "client_stall_timeout_secs",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} has to be more than 0")
        for name in (
            "shutdown_grace_period_secs",
            "drain_evacuate_secs",
            "queue_size",
            "retry_max_retries",
            "retry_initial_backoff_ms",
            "retry_max_backoff_ms",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} cannot be negative")
        for name in ("tree_budget_mib", "max_body_bytes", "cb_failure_threshold"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} has to be at least 1")
        self._check_access()
        for policy in filter(None, (self.policy, self.prefill_policy, self.decode_policy)):
            find_policy(policy)
        urls = [info.url for info in self.static]
        if repeated := {url for url in urls if urls.count(url) > 1}:
            raise ConfigError(f"{repeated.pop()} is named twice")

    def _check_access(self) -> None:
        """Raises ConfigError for limits and certificates that cannot be meant."""
        if self.rate_limit_tokens_per_second is not None and not self.rate_limit_tokens_per_second > 0:
            raise ConfigError("--rate-limit-tokens-per-second has to be more than 0")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("--ssl-certfile and --ssl-keyfile go together")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ConfigError("--api-key has to be ASCII, and not empty")
        for name in ("max_buffered_mib", "max_connections"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} has to be at least 1")


def parse_args(argv: Sequence[str] | None = None) -> RouterConfig:
    """The configuration that the command line asks for; ends the process on a bad flag.

    Raises ConfigError for a value that no flag type could refuse.
    """
    parser = CompatParser(
        prog="python -m memserve.launch_router",
        description="Serve one HTTP address in front of prefill, decode and colocated SGLang servers. "
        "Speaks SGLang's native API and OpenAI's, and understands the flags of sglang-router.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, RouterConfig)
    add_flags(parser.add_argument_group("watching it"), ObservabilityConfig)
    servers = parser.add_argument_group("servers that do not register themselves (stock SGLang)")
    servers.add_argument(
        "--prefill",
        nargs="+",
        action="append",
        default=[],
        metavar=("URL", "BOOTSTRAP_PORT"),
        help=f"a prefill server and its --disaggregation-bootstrap-port (default: {DEFAULT_BOOTSTRAP_PORT}); "
        "repeatable",
    )
    servers.add_argument(
        "--decode", action="append", default=[], metavar="URL", help="a decode server; repeatable"
    )
    servers.add_argument(
        "--worker-urls", nargs="*", default=[], metavar="URL", help="servers that do both prefill and decode"
    )
    add_discovery_flags(parser)
    parser.add_compatible()
    namespace = parser.parse_args(argv)
    remarks = settle(namespace)
    static = [
        *(_prefill(values) for values in namespace.prefill),
        *(static_server(url, Role.DECODE) for url in namespace.decode),
        *(static_server(url, Role.COLOCATED) for url in namespace.worker_urls),
    ]
    return from_namespace(
        RouterConfig,
        namespace,
        observe=from_namespace(ObservabilityConfig, namespace),
        remarks=remarks,
        static=tuple(static),
        discovery=read_discovery(namespace),
    )


def _prefill(values: list[str]) -> InstanceInfo:
    if len(values) > 2:
        raise ConfigError(f"--prefill takes a URL and at most one port, not {' '.join(values)}")
    port = values[1] if len(values) == 2 and values[1].lower() != "none" else str(DEFAULT_BOOTSTRAP_PORT)
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--prefill {values[0]} {port}: the bootstrap port is not a port")
    return static_server(values[0], Role.PREFILL, int(port))
