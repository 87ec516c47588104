"""Settings and flags of Kubernetes discovery, named as in sglang-router. Pure."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from memserve.core.errors import ConfigError
from memserve.wire.messages import Role

BOOTSTRAP_ANNOTATION = "sglang.ai/bootstrap-port"
_LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?=[-A-Za-z0-9_.]*")


@dataclass(frozen=True, slots=True)
class DiscoveryConfig:
    """Which pods to find, and where. Checked when built; raises ConfigError."""

    selectors: Mapping[Role, tuple[str, ...]]
    """Per role, the labels NAME=VALUE that its pods all have."""
    port: int = 80
    """HTTP port of all servers."""
    namespace: str | None = None
    """None: the router's own, or all if it does not run in a pod."""
    bootstrap_annotation: str = BOOTSTRAP_ANNOTATION
    """Annotation of a prefill pod with its bootstrap port."""
    api_server: str | None = None
    """URL; None: the API of the cluster that the router runs in."""
    token_file: Path | None = None
    ca_file: Path | None = None
    list_timeout_s: float = 30.0
    watch_s: int = 240
    """Time after which the API ends a watch; one that is silent for 30 s more is broken."""
    max_event_bytes: int = 16 << 20
    """A longer event ends the watch."""
    drain_s: float = 30.0
    """Time limit of a leaving server's drain: Kubernetes' default termination grace period."""

    def __post_init__(self) -> None:
        if not self.selectors:
            raise ConfigError(
                "--service-discovery needs labels to look for: give --selector NAME=VALUE, or "
                "--prefill-selector and --decode-selector"
            )
        for label in (label for labels in self.selectors.values() for label in labels):
            if not _LABEL.fullmatch(label):
                raise ConfigError(f"{label} is not a label to select pods by: write NAME=VALUE")
        if not 0 < self.port < 65536:
            raise ConfigError(f"--service-discovery-port {self.port} is not a port")
        if self.api_server is not None and not re.match(r"https?://[^/]", self.api_server):
            raise ConfigError(f"--kube-api-server {self.api_server}: write http(s)://HOST:PORT")


def add_discovery_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `read_discovery` reads."""
    flags = parser.add_argument_group("servers found among Kubernetes' pods (stock SGLang)")
    flags.add_argument("--service-discovery", action="store_true", help="find servers among the pods")
    for flag, servers in (
        ("--selector", "colocated servers"),
        ("--prefill-selector", "prefill servers"),
        ("--decode-selector", "decode servers"),
    ):
        flags.add_argument(
            flag, nargs="+", default=[], metavar="NAME=VALUE", help=f"labels of the pods of {servers}"
        )
    flags.add_argument(
        "--service-discovery-port",
        type=int,
        default=80,
        metavar="N",
        help="HTTP port of the servers (default: 80)",
    )
    flags.add_argument(
        "--service-discovery-namespace",
        metavar="NAME",
        help="namespace of the pods (default: the router's own, or all if it does not run in a pod)",
    )
    flags.add_argument(
        "--bootstrap-port-annotation",
        default=BOOTSTRAP_ANNOTATION,
        metavar="NAME",
        help=f"annotation of a prefill pod with its bootstrap port (default: {BOOTSTRAP_ANNOTATION})",
    )
    flags.add_argument(
        "--kube-api-server", metavar="URL", help="Kubernetes' API (default: the API of the pod's own cluster)"
    )
    for name, what in (
        ("token", "file with the token for the API"),
        ("ca", "file with the API's certificate authority"),
    ):
        flags.add_argument(
            f"--kube-{name}-file", type=Path, metavar="FILE", help=f"{what} (default: the pod's own)"
        )


def read_discovery(namespace: argparse.Namespace) -> DiscoveryConfig | None:
    """The discovery that the parsed flags ask for; None: no discovery. Raises ConfigError."""
    by_role = {
        Role.COLOCATED: tuple(namespace.selector),
        Role.PREFILL: tuple(namespace.prefill_selector),
        Role.DECODE: tuple(namespace.decode_selector),
    }
    selectors = {role: labels for role, labels in by_role.items() if labels}
    if not namespace.service_discovery:
        if selectors:
            raise ConfigError("selectors do nothing without --service-discovery: add it")
        return None
    return DiscoveryConfig(
        selectors=selectors,
        port=namespace.service_discovery_port,
        namespace=namespace.service_discovery_namespace,
        bootstrap_annotation=namespace.bootstrap_port_annotation,
        api_server=namespace.kube_api_server,
        token_file=namespace.kube_token_file,
        ca_file=namespace.kube_ca_file,
    )
