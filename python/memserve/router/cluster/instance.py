"""Immutable records of the instances that can serve requests, and of the cluster at one moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from memserve.core.ids import Epoch, InstanceId
from memserve.router.server_info import ServerInfo
from memserve.wire.messages import Role


@dataclass(frozen=True, slots=True)
class Instance:
    """A server that can take requests."""

    instance_id: InstanceId
    epoch: Epoch
    role: Role
    url: str
    bootstrap_port: int | None
    server_info: ServerInfo

    @property
    def bootstrap_host(self) -> str:
        """The host that decode servers connect to for this prefill's KV."""
        return urlsplit(self.url).hostname or ""


@dataclass(frozen=True, slots=True)
class Pair:
    """The prefill and the decode server of one request."""

    prefill: Instance
    decode: Instance

    def __str__(self) -> str:
        return f"{self.prefill.instance_id}+{self.decode.instance_id}"


@dataclass(frozen=True, slots=True)
class Single:
    """The colocated server of one request."""

    worker: Instance

    def __str__(self) -> str:
        return str(self.worker.instance_id)


Route = Pair | Single


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """The instances that could take a request at one moment."""

    prefills: tuple[Instance, ...] = ()
    decodes: tuple[Instance, ...] = ()
    colocated: tuple[Instance, ...] = ()
    _serving: dict[str, ClusterSnapshot] = field(default_factory=dict, init=False, repr=False, compare=False)
    _by_id: dict[InstanceId, Instance] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, instances: Iterable[Instance]) -> ClusterSnapshot:
        """The snapshot of `instances`, each under its role, in the order given."""
        by_role: dict[Role, list[Instance]] = {role: [] for role in Role}
        for instance in instances:
            by_role[instance.role].append(instance)
        return cls(tuple(by_role[Role.PREFILL]), tuple(by_role[Role.DECODE]), tuple(by_role[Role.COLOCATED]))

    def all(self) -> tuple[Instance, ...]:
        """Every instance; those that answer clients first."""
        return self.colocated + self.decodes + self.prefills

    def get(self, instance_id: InstanceId) -> Instance:
        """The instance with that id. Raises KeyError."""
        if not self._by_id:
            self._by_id.update((it.instance_id, it) for it in self.all())
        return self._by_id[instance_id]

    def models(self) -> tuple[str, ...]:
        """The models served, each once."""
        return tuple(dict.fromkeys(instance.server_info.model for instance in self.all()))

    def serving(self, model: str) -> ClusterSnapshot:
        """The instances that serve `model`, or the model of a `model:adapter` (SGLang's LoRA syntax)."""
        serving = self._serving.get(model)
        if serving is None:
            chosen = [it for it in self.all() if it.server_info.serves(model)]
            serving = self if len(chosen) == len(self.all()) else ClusterSnapshot.of(chosen)
            if any(
                it.server_info.model == model for it in chosen
            ):  # adapter names are unbounded: do not keep them
                self._serving[model] = serving
        return serving

    def unavailable_reason(self) -> str | None:
        """Why no request can be served; None if requests can be served."""
        if self.colocated or (self.prefills and self.decodes):
            return None
        if self.prefills:
            return "no decode server is ready"
        if self.decodes:
            return "no prefill server is ready"
        return "no server is ready"
