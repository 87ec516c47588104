"""Parses pods of Kubernetes' API, and says which of them are servers. Pure.

Source: Kubernetes API reference, core/v1 Pod and PodList; API concepts, "Efficient detection of changes".
"""

from __future__ import annotations

import logging

import msgspec

from memserve.core.errors import ConfigError, MemServeError
from memserve.core.hosts import bracketed
from memserve.router.cluster.discovery.config import DiscoveryConfig
from memserve.router.cluster.discovery.static import DEFAULT_BOOTSTRAP_PORT, static_server
from memserve.wire.messages import InstanceInfo, Role

logger = logging.getLogger(__name__)


class ListExpired(MemServeError):
    """The listed version is too old to watch from: list again."""


class _Condition(msgspec.Struct):
    type: str = ""
    status: str = ""


class _Meta(msgspec.Struct):
    name: str
    uid: str = ""
    resource_version: str = msgspec.field(name="resourceVersion", default="")
    annotations: dict[str, str] | None = None
    deletion_timestamp: str | None = msgspec.field(name="deletionTimestamp", default=None)


class _Status(msgspec.Struct):
    phase: str = ""
    pod_ip: str = msgspec.field(name="podIP", default="")
    conditions: list[_Condition] | None = None


class Pod(msgspec.Struct):
    """The needed fields of a pod."""

    metadata: _Meta
    status: _Status = msgspec.field(default_factory=_Status)

    @property
    def key(self) -> str:
        """Unique per pod: its UID, or its name if it has none."""
        return self.metadata.uid or self.metadata.name

    @property
    def is_ready(self) -> bool:
        """True if it takes requests and is not being deleted."""
        conditions = self.status.conditions or []
        return (
            self.status.phase == "Running"
            and bool(self.status.pod_ip)
            and self.metadata.deletion_timestamp is None
            and any(one.type == "Ready" and one.status == "True" for one in conditions)
        )


class _ListMeta(msgspec.Struct):
    resource_version: str = msgspec.field(name="resourceVersion", default="")


class _PodList(msgspec.Struct):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Failure(msgspec.Struct):
    code: int = 0
    message: str = ""


class PodChange(msgspec.Struct):
    """One event of a watch."""

    version: str
    """The version to watch from."""
    pod: Pod | None = None
    """None: only the version has changed."""
    is_deleted: bool = False


_list = msgspec.json.Decoder(_PodList)
_event = msgspec.json.Decoder(_Event)
_pod = msgspec.json.Decoder(Pod)
_failure = msgspec.json.Decoder(_Failure)


def read_list(body: bytes) -> tuple[str, list[Pod]]:
    """The version of a list, to watch from, and its pods, without malformed ones.

    Raises msgspec.MsgspecError if `body` is not a list.
    """
    listed = _list.decode(body)
    pods = []
    for item in listed.items or []:
        try:
            pods.append(_pod.decode(item))
        except msgspec.MsgspecError as error:
            logger.warning("malformed pod left out: %s", error)
    return listed.metadata.resource_version, pods


def read_change(line: bytes) -> PodChange | None:
    """The change in one line of a watch; None if it is malformed.

    Raises ListExpired, or ConnectionError for any other failure that the API reports.
    """
    try:
        event = _event.decode(line)
        if event.type == "ERROR":
            failure = _failure.decode(event.object)
        else:
            pod = _pod.decode(event.object) if event.type != "BOOKMARK" else None
            meta = pod.metadata if pod is not None else _list.decode(event.object).metadata
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        logger.warning("malformed event left out: %s", error)
        return None
    if event.type == "ERROR":
        if failure.code == 410:
            raise ListExpired(failure.message)
        raise ConnectionError(f"{failure.code} {failure.message}")
    return PodChange(meta.resource_version, pod, event.type == "DELETED")


def server_in(pod: Pod, role: Role, config: DiscoveryConfig) -> InstanceInfo | None:
    """The server of `role` in a pod; None if it is not ready, or its annotation is invalid."""
    if not pod.is_ready:
        return None
    bootstrap_port = None
    if role is Role.PREFILL:
        said = (pod.metadata.annotations or {}).get(config.bootstrap_annotation, str(DEFAULT_BOOTSTRAP_PORT))
        if not said.isascii() or not said.isdigit() or not 0 < int(said) < 65536:
            logger.warning(
                "pod left out name=%s: its annotation %s is not a port: %.20s",
                *(pod.metadata.name, config.bootstrap_annotation, said),
            )
            return None
        bootstrap_port = int(said)
    try:
        return static_server(f"http://{bracketed(pod.status.pod_ip)}:{config.port}", role, bootstrap_port)
    except ConfigError as error:
        logger.warning("pod left out name=%s: %s", pod.metadata.name, error)
        return None
