"""The router's whole configuration: one record per component, and which flags they come from."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

from memserve.core.flags import check_settings, setting
from memserve.router.admission.config import AdmissionConfig
from memserve.router.auth.config import AuthConfig, TlsConfig
from memserve.router.cluster.config import ClusterConfig, HealthConfig
from memserve.router.cluster.discovery.config import DiscoveryConfig
from memserve.router.compat import POLICY_SYNONYMS
from memserve.router.http.config import HttpConfig
from memserve.router.kv_events.config import TreeConfig
from memserve.router.observability.config import ObservabilityConfig
from memserve.router.proxy.config import ProxyConfig
from memserve.router.tokenization.config import TokenizationConfig
from memserve.scheduling.policies import describe_policies, find_policy


@dataclass(frozen=True, slots=True)
class RoutingConfig:
    """How instances are chosen. Checked when built; raises ConfigError."""

    policy: str = setting(
        "prompt_tree",
        f"how instances are chosen: {describe_policies()}; MODULE:FUNCTION: a policy of yours",
        synonyms=POLICY_SYNONYMS,
        metavar="NAME",
    )
    prefill_policy: str | None = setting(
        None,
        "policy for prefill and colocated instances; default: --policy",
        synonyms=POLICY_SYNONYMS,
        metavar="NAME",
    )
    decode_policy: str | None = setting(
        None, "policy for decode instances; default: --policy", synonyms=POLICY_SYNONYMS, metavar="NAME"
    )
    fetch: Literal["auto", "always", "never"] = setting(
        "auto",
        "whether a prefill fetches cached blocks from other instances before a request; auto: if that takes "
        "less time than computing them (Eq. 2); always: whatever it costs, within --max-fetch-secs",
    )
    max_fetch_secs: float = setting(
        2.0, "time limit of a fetch, whatever it saves: the holder of the blocks may be gone", above=0
    )
    recent_work_secs: float = setting(180.0, "how long the work of a request counts as recent", above=0)
    costs: str = setting(
        "auto",
        "initial cost model: gpu, cpu, or a file written by benchmark/fit_cost_model.py; auto: gpu or cpu, "
        "by the servers' device",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for policy in self.policies.values():
            find_policy(policy)

    @property
    def policies(self) -> dict[str, str]:
        """The policy of each role, `prefill` and `decode`."""
        return {
            "prefill": self.prefill_policy or self.policy,
            "decode": self.decode_policy or self.policy,
        }


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """The records of all components; each component gets its own."""

    http: HttpConfig = field(default_factory=HttpConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)
    tokenization: TokenizationConfig = field(default_factory=TokenizationConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    discovery: DiscoveryConfig | None = None
    """Servers found among Kubernetes' pods; None: no discovery."""
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)

    @classmethod
    def of(cls, discovery: DiscoveryConfig | None = None, **settings: Any) -> RouterConfig:
        """The configuration with these settings, each under its own name, in whichever record has it.

        Raises ConfigError for a bad value, TypeError for a name that no record has.
        """
        parts: dict[str, Any] = {"discovery": discovery}
        for name, record in RECORDS.items():
            own = {one.name for one in fields(record)} & settings.keys()
            parts[name] = record(**{one: settings.pop(one) for one in own})
        if settings:
            raise TypeError(f"no record has the settings {', '.join(settings)}")
        return cls(**parts)


RECORDS: dict[str, Any] = {
    name: record for name, record in get_type_hints(RouterConfig).items() if is_dataclass(record)
}
"""By field of RouterConfig: the records that flags are made of."""
