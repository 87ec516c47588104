"""The router's command line: its flags, and the configuration that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memserve.core.errors import ConfigError
from memserve.core.flags import add_flags, from_namespace, settings_in
from memserve.router.cluster.discovery.config import add_discovery_flags, read_discovery
from memserve.router.cluster.discovery.static import DEFAULT_BOOTSTRAP_PORT, static_server
from memserve.router.compat import CompatParser, settle
from memserve.router.config import RECORDS, RouterConfig
from memserve.router.observability.config import LogConfig
from memserve.wire.messages import InstanceInfo, Role

GROUPS = {
    "http": "HTTP server",
    "auth": "access",
    "tls": "certificates",
    "admission": "queue and limits",
    "routing": "choice of instances",
    "tree": "prompt tree",
    "tokenization": "tokenization",
    "proxy": "requests to servers",
    "cluster": "cluster",
    "health": "health of servers",
    "observability": "metrics, traces, dashboard",
}
EXAMPLES = """\
examples:
  # MemServe servers register themselves:
  python -m memserve.launch_router
  python -m memserve.launch_server --role prefill --router 127.0.0.1:30001 --model-path MODEL
  python -m memserve.launch_server --role decode  --router 127.0.0.1:30001 --model-path MODEL

  # stock SGLang servers are named by URL:
  python -m memserve.launch_router --prefill http://127.0.0.1:30100 8998 --decode http://127.0.0.1:30200
  python -m memserve.launch_router --worker-urls http://127.0.0.1:30300 http://127.0.0.1:30400

  # or found among Kubernetes' pods, by their labels:
  python -m memserve.launch_router --service-discovery --selector app=sglang --service-discovery-port 8000

  # several machines: the cluster key admits instances
  python -m memserve.launch_router --host 10.0.0.1 --cluster-key-file cluster.key
"""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What a command line asks for."""

    config: RouterConfig
    logs: LogConfig
    remarks: tuple[str, ...]
    """Notes on flags of sglang-router, to be logged."""


def parse_args(argv: Sequence[str] | None = None) -> CommandLine:
    """Parse `argv`; exits the process on an unknown flag. Raises ConfigError for a bad value."""
    namespace = _parser().parse_args(argv)
    remarks = settle(namespace)
    settings: dict[str, Any] = {}
    for record in RECORDS.values():
        settings |= settings_in(record, namespace)
    config = RouterConfig.of(read_discovery(namespace), static=_static(namespace), **settings)
    return CommandLine(config, from_namespace(LogConfig, namespace), remarks)


def _parser() -> CompatParser:
    parser = CompatParser(
        prog="python -m memserve.launch_router",
        description="Serve one HTTP address in front of prefill, decode and colocated SGLang servers. "
        "Speaks SGLang's native API and OpenAI's, and accepts the flags of sglang-router.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, title in GROUPS.items():
        add_flags(parser.add_argument_group(title), RECORDS[name])
    add_flags(parser.add_argument_group("logs"), LogConfig)
    servers = parser.add_argument_group("servers that do not register themselves (stock SGLang)")
    servers.add_argument(
        "--prefill",
        nargs="+",
        action="append",
        default=[],
        metavar=("URL", "BOOTSTRAP_PORT"),
        help="a prefill server and its --disaggregation-bootstrap-port "
        f"(default: {DEFAULT_BOOTSTRAP_PORT}); repeatable",
    )
    servers.add_argument(
        "--decode", action="append", default=[], metavar="URL", help="a decode server; repeatable"
    )
    servers.add_argument(
        "--worker-urls", nargs="*", default=[], metavar="URL", help="servers that both prefill and decode"
    )
    add_discovery_flags(parser)
    parser.add_compatible()
    return parser


def _static(namespace: argparse.Namespace) -> tuple[InstanceInfo, ...]:
    named = (
        *(_prefill(values) for values in namespace.prefill),
        *(static_server(url, Role.DECODE) for url in namespace.decode),
        *(static_server(url, Role.COLOCATED) for url in namespace.worker_urls),
    )
    return tuple(dict.fromkeys(named))


def _prefill(values: list[str]) -> InstanceInfo:
    if len(values) > 2:
        raise ConfigError(f"--prefill takes a URL and at most one port, not {' '.join(values)}")
    port = values[1] if len(values) == 2 and values[1].lower() != "none" else str(DEFAULT_BOOTSTRAP_PORT)
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--prefill {values[0]} {port}: the bootstrap port is not a port")
    return static_server(values[0], Role.PREFILL, int(port))
