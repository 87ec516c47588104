"""Finds servers among Kubernetes' pods: lists pods, watches changes, adds and removes static servers.

    list ──> watch ──the stream ends──> watch on      410 Gone ──> list again
      ^        └──broken, refused, malformed──> wait, longer each time
      └────────────────────────────────────────────────┘
    ready ──> added, as by POST /workers      not ready, deleted ──> drained, then removed

While the API is unreachable, the servers found before stay. `pods` parses pods. Servers that others have
added are not removed here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path

import aiohttp
import msgspec

from memserve.core.errors import ConfigError
from memserve.core.hosts import bracketed
from memserve.router.cluster.discovery.config import DiscoveryConfig
from memserve.router.cluster.discovery.pods import ListExpired, Pod, read_change, read_list, server_in
from memserve.router.cluster.drain import DrainManager
from memserve.router.cluster.registry import InstanceRegistry
from memserve.wire.messages import InstanceInfo, Role

logger = logging.getLogger(__name__)

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes mounts a pod's credentials for its API."""
FIRST_RETRY_S, LAST_RETRY_S = 0.5, 30.0

_FAULTS = (aiohttp.ClientError, OSError, TimeoutError, ValueError, msgspec.MsgspecError)


class PodApi:
    """Client of Kubernetes' pod API. Raises ConfigError if its address is not known."""

    def __init__(self, config: DiscoveryConfig, account: Path = ACCOUNT) -> None:
        self._config = config
        self._base = config.api_server.rstrip("/") if config.api_server else _own_api()
        self._token_file = config.token_file or _if_there(account / "token", config)
        ca_file = config.ca_file or _if_there(account / "ca.crt", config)
        namespace = config.namespace or _read(_if_there(account / "namespace", config))
        self._path = f"/api/v1/namespaces/{namespace}/pods" if namespace else "/api/v1/pods"
        try:
            self._tls = ssl.create_default_context(cafile=ca_file) if ca_file else None
        except OSError as error:
            raise ConfigError(f"--kube-ca-file {ca_file}: {error}") from error

    async def list(self, session: aiohttp.ClientSession, labels: str) -> tuple[str, list[Pod]]:
        """All pods with these labels, and the version to watch from."""
        timeout = aiohttp.ClientTimeout(total=self._config.list_timeout_s)
        async with self._get(session, {"labelSelector": labels}, timeout) as response:
            return read_list(await response.read())

    async def watch(self, session: aiohttp.ClientSession, labels: str, version: str) -> AsyncIterator[bytes]:
        """One line per change since `version`. Raises ListExpired."""
        params = {
            "labelSelector": labels,
            "watch": "1",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(self._config.watch_s),
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=self._config.watch_s + 30.0)
        async with self._get(session, params, timeout) as response:
            rest = b""
            async for chunk in response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > self._config.max_event_bytes:
                    raise ValueError(f"an event of more than {self._config.max_event_bytes} bytes")
                for line in filter(None, lines):
                    yield line

    def _get(
        self, session: aiohttp.ClientSession, params: Mapping[str, str], timeout: aiohttp.ClientTimeout
    ) -> _Answer:
        # Read each time: Kubernetes rotates it.
        token = _read(self._token_file)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = self._base + self._path
        return _Answer(
            session.get(url, params=params, headers=headers, timeout=timeout, ssl=self._tls or True)
        )


class _Answer:
    """Context of an answer; a status other than 200 is an error."""

    def __init__(self, request: aiohttp.client._RequestContextManager) -> None:
        self._request = request

    async def __aenter__(self) -> aiohttp.ClientResponse:
        response = await self._request.__aenter__()
        if response.status == 410:
            response.close()
            raise ListExpired("410 Gone")
        if response.status != 200:
            response.close()
            raise ConnectionError(f"{response.status} {response.reason}")
        return response

    async def __aexit__(self, *error: object) -> None:
        await self._request.__aexit__(*error)  # type: ignore[arg-type]


class Discovery:
    """Keeps static servers in step with Kubernetes' pods. Event loop thread only."""

    def __init__(
        self, config: DiscoveryConfig, cluster: InstanceRegistry, drains: DrainManager, api: PodApi
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._drains = drains
        self._api = api
        self._found: dict[Role, dict[str, InstanceInfo]] = {role: {} for role in config.selectors}
        """By role and pod key."""
        self._added: dict[str, InstanceInfo] = {}
        """By URL: the servers added here, which are removed here."""
        self._removing: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Watch until cancelled. Uses an own session: the servers' API key is not for Kubernetes."""
        try:
            async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
                for role, labels in self._config.selectors.items():
                    group.create_task(self._follow(session, role, ",".join(labels)))
        finally:
            for task in self._removing.values():
                task.cancel()

    async def _follow(self, session: aiohttp.ClientSession, role: Role, labels: str) -> None:
        num_failures = 0
        while True:
            try:
                version, pods = await self._api.list(session, labels)
                logger.debug("pods listed role=%s num=%d", role, len(pods))
                self._replace(role, pods)
                while True:
                    async for line in self._api.watch(session, labels, version):
                        change = read_change(line)
                        if change is not None:
                            num_failures = 0
                            version = change.version or version
                            self._change(role, change.pod, change.is_deleted)
            except ListExpired:
                logger.info("pods are listed anew role=%s", role)
            except _FAULTS as error:
                reason = str(error) or type(error).__name__
                logger.warning("kubernetes does not answer, will try again role=%s: %s", role, reason)
            num_failures += 1
            await asyncio.sleep(retry_s(num_failures, random.random()))

    def _replace(self, role: Role, pods: Iterable[Pod]) -> None:
        found = {pod.key: server_in(pod, role, self._config) for pod in pods}
        self._found[role] = {key: info for key, info in found.items() if info is not None}
        self._apply()

    def _change(self, role: Role, pod: Pod | None, is_deleted: bool) -> None:
        if pod is None:
            return
        info = None if is_deleted else server_in(pod, role, self._config)
        if info is not None:
            self._found[role][pod.key] = info
        else:
            self._found[role].pop(pod.key, None)
        self._apply()

    def _apply(self) -> None:
        """Add the servers that were found; drain and remove those that were not."""
        wanted = {info.url: info for found in self._found.values() for info in found.values()}
        for url, info in list(self._added.items()):
            if wanted.get(url) == info:
                self._undrain(url)
            elif url not in self._removing:
                logger.info("pod gone url=%s", url)
                self._removing[url] = asyncio.create_task(self._remove(url))
        for url, info in wanted.items():
            if url not in self._added and url not in self._cluster.static_urls():
                self._added[url] = self._cluster.add_static(info)

    def _undrain(self, url: str) -> None:
        removing, member = self._removing.pop(url, None), self._cluster.find(url)
        if removing is not None:
            removing.cancel()
            if member is not None:
                self._drains.end(member)

    async def _remove(self, url: str) -> None:
        member = self._cluster.find(url)
        if member is not None and member.is_static:
            self._drains.begin(member)
            await self._drains.wait(member, self._config.drain_s)
        self._cluster.remove_static(url)
        del self._added[url], self._removing[url]
        self._apply()  # Another pod may have its URL now, in another role.


def retry_s(num_failures: int, chance: float) -> float:
    """Wait after `num_failures` in a row; `chance`, 0 to 1, spreads several routers."""
    return min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(num_failures - 1, 20)) * (0.5 + chance / 2)


def _own_api() -> str:
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise ConfigError("--service-discovery outside of Kubernetes needs --kube-api-server URL")
    return f"https://{bracketed(host)}:{port}"


def _if_there(path: Path, config: DiscoveryConfig) -> Path | None:
    """The path, if the file exists and the API is that of the pod's own cluster."""
    return path if config.api_server is None and path.is_file() else None


def _read(path: Path | None) -> str:
    return path.read_text().strip() if path is not None else ""
