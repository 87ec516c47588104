"""How servers are found among Kubernetes' pods, and the flags that say so: those of sglang-router. Pure."""

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
    """Where to look for which pods. Raises ConfigError for what cannot be."""

    selectors: Mapping[Role, tuple[str, ...]]
    """Labels, each as NAME=VALUE, that the pods of a role have all of."""
    port: int = 80
    """Of the servers' HTTP, the same for all."""
    namespace: str | None = None
    """None: the router's own, or all of them where it runs in no pod."""
    bootstrap_annotation: str = BOOTSTRAP_ANNOTATION
    """Of a prefill's pod: its bootstrap port."""
    api_server: str | None = None
    """URL; None: that of the cluster whose pod the router runs in."""
    token_file: Path | None = None
    ca_file: Path | None = None

    def __post_init__(self) -> None:
        if not self.selectors:
            raise ConfigError(
                "--service-discovery needs to know whom to look for: give --selector NAME=VALUE, or "
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
    flags.add_argument("--service-discovery", action="store_true", help="look for servers there")
    for flag, who in (
        ("--selector", "servers that do both prefill and decode"),
        ("--prefill-selector", "prefill servers"),
        ("--decode-selector", "decode servers"),
    ):
        flags.add_argument(
            flag, nargs="+", default=[], metavar="NAME=VALUE", help=f"labels that the pods of {who} have"
        )
    flags.add_argument(
        "--service-discovery-port", type=int, default=80, metavar="N", help="their HTTP port (default: 80)"
    )
    flags.add_argument(
        "--service-discovery-namespace",
        metavar="NAME",
        help="where they are (default: the router's own namespace, or all if it runs in no pod)",
    )
    flags.add_argument(
        "--bootstrap-port-annotation",
        default=BOOTSTRAP_ANNOTATION,
        metavar="NAME",
        help=f"annotation of a prefill's pod with its bootstrap port (default: {BOOTSTRAP_ANNOTATION})",
    )
    flags.add_argument(
        "--kube-api-server", metavar="URL", help="Kubernetes' API (default: that of the pod's own cluster)"
    )
    for name, what in (("token", "token to show there"), ("ca", "authority that vouches for it")):
        flags.add_argument(
            f"--kube-{name}-file", type=Path, metavar="FILE", help=f"{what} (default: the pod's own)"
        )


def read_discovery(namespace: argparse.Namespace) -> DiscoveryConfig | None:
    """What the parsed flags ask for; None if it is not asked for. Raises ConfigError."""
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
