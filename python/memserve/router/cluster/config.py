"""Settings of membership: the control plane, heartbeats, health checks, breakers, drains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memserve.core.errors import ConfigError
from memserve.core.flags import check_settings, setting
from memserve.wire.messages import InstanceInfo


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Checked when built; raises ConfigError."""

    control_port: int | None = setting(
        None, "port where instances register; default: the HTTP port + 1; 0 picks a free one", at_least=0
    )
    cluster_key_file: Path | None = setting(
        None, "secret that all members share; required if --host is not a loopback address"
    )
    heartbeat_secs: float = setting(2.0, "time between the heartbeats of registered instances", above=0)
    suspect_heartbeats: float = setting(
        2.0, "silence, in heartbeats, that makes an instance suspect", metavar="N", above=0
    )
    down_heartbeats: float = setting(
        3.0, "silence, in heartbeats, after which an instance is down", metavar="N", above=0
    )
    forget_heartbeats: float = setting(
        5.0, "silence, in heartbeats, after which an instance or a pool is forgotten", metavar="N", above=0
    )
    stuck_secs: float = setting(
        15.0, "time without a scheduler step after which an instance is suspect", above=0
    )
    drain_evacuate_secs: float = setting(
        10.0, "time for a drained instance to send its KV cache to others; 0: it keeps it", at_least=0
    )
    static: tuple[InstanceInfo, ...] = ()
    """Servers named by URL; no two share one."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.control_port is not None and self.control_port >= 65536:
            raise ConfigError(f"--control-port {self.control_port} is not a port")
        if not self.suspect_heartbeats <= self.down_heartbeats <= self.forget_heartbeats:
            raise ConfigError("--suspect-heartbeats, --down-heartbeats, --forget-heartbeats have to rise")
        urls = [info.url for info in self.static]
        if repeated := {url for url in urls if urls.count(url) > 1}:
            raise ConfigError(f"{repeated.pop()} is named twice")


@dataclass(frozen=True, slots=True)
class HealthConfig:
    """Checked when built; raises ConfigError."""

    health_check_interval_secs: float = setting(
        10.0, "time between the health checks of a server that does not register", above=0
    )
    health_check_timeout_secs: float = setting(
        30.0, "time limit of a health check, for which SGLang generates a token", above=0
    )
    slow_health_check_secs: float = setting(
        5.0, "time after which an unanswered health check makes the server suspect", above=0
    )
    server_info_timeout_secs: float = setting(
        10.0, "time limit for reading a server's information pages", above=0
    )
    unready_probe_secs: float = setting(
        0.3, "time between two health checks of a server that is not ready", above=0
    )
    silent_probe_secs: float = setting(
        1.0, "time between two health checks of an instance without heartbeats", above=0
    )
    router_pause_secs: float = setting(
        1.0,
        "pause of the router itself, stopped or busy, after which no silence of an instance counts",
        above=0,
    )
    cb_failure_threshold: int = setting(
        5, "failed requests in a row after which an instance gets none while there are others", at_least=1
    )
    cb_timeout_secs: float = setting(2.0, "time until such an instance gets one request as a trial", above=0)

    def __post_init__(self) -> None:
        check_settings(self)
