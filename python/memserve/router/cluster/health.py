"""Probes instances over HTTP: health, model, limits. `InstanceRegistry` decides what follows."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

import aiohttp

from memserve.core.errors import InstanceLost
from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.config import HealthConfig
from memserve.router.cluster.instance import ClusterSnapshot
from memserve.router.cluster.member import Member, State, SuspectReason
from memserve.router.cluster.pools import Pools
from memserve.router.cluster.registry import InstanceRegistry
from memserve.router.errors import TokenizerMismatch, describe
from memserve.router.request import JsonObject
from memserve.router.server_info import ServerInfo, read_server_info
from memserve.wire.messages import InstanceInfo

logger = logging.getLogger(__name__)

_PROBE_ERRORS = (aiohttp.ClientError, OSError, ValueError, InstanceLost)


class TokenizerCheck(Protocol):
    """Confirms that an instance tokenizes as the router and the model's other instances do."""

    async def admit(
        self,
        instance: InstanceId,
        model: str,
        model_path: str,
        server_info: JsonObject,
        ask: Callable[[JsonObject], Awaitable[object]],
    ) -> None:
        """Check one instance; `ask` calls its /v1/tokenize.

        Raises TokenizerMismatch, and the errors of `ask`.
        """

    def forget(self, instance: InstanceId) -> None:
        """Drop the result for an instance that has left. Idempotent."""


class HealthProber:
    """Probes new members until they are ready, and static ones regularly. Event loop thread only."""

    def __init__(
        self,
        cluster: InstanceRegistry,
        pools: Pools,
        tokenizers: TokenizerCheck,
        session: aiohttp.ClientSession,
        config: HealthConfig,
        clock: Callable[[], float],
    ) -> None:
        self._cluster = cluster
        self._pools = pools
        self._tokenizers = tokenizers
        self._session = session
        self._config = config
        self._clock = clock
        self._probed_s: dict[InstanceId, float] = {}
        self._unfit: set[InstanceId] = set()
        """Instances that serve, but do not fit their model's others: probed as seldom as ready ones."""
        self._running: dict[tuple[InstanceId, Epoch], asyncio.Task[None]] = {}
        self._begun_s: dict[tuple[InstanceId, Epoch], float] = {}

    async def run(self) -> None:
        """Probe until cancelled. A slow instance delays no other."""
        looked_s, retry_s = self._clock(), self._config.unready_probe_secs
        try:
            while True:
                self._cluster.probe_needed.clear()
                away_s = self._clock() - looked_s - retry_s
                looked_s = self._clock()
                if away_s > self._config.router_pause_secs:
                    logger.warning("this router was away for seconds=%.1f", away_s)
                    self._cluster.shift_deadlines(away_s)
                    self._pools.shift_deadlines(away_s)
                self._cluster.check_heartbeats()
                self._pools.forget_silent()
                self._start_due()
                try:
                    await asyncio.wait_for(self._cluster.probe_needed.wait(), retry_s)
                except TimeoutError:
                    continue
        finally:
            for task in self._running.values():
                task.cancel()

    def _start_due(self) -> None:
        members = {member.info.instance_id: member for member in self._cluster.members()}
        for process in self._begun_s.keys() - self._running.keys():
            del self._begun_s[process]
        for gone in self._probed_s.keys() - members.keys():
            del self._probed_s[gone]
            self._unfit.discard(gone)
            self._tokenizers.forget(gone)
        slow_s = self._config.slow_health_check_secs
        for member in members.values():
            # A new process is probed although the probe of its predecessor hangs.
            process = (member.info.instance_id, member.info.epoch)
            is_slow = process in self._running and self._clock() > self._begun_s[process] + slow_s
            if member.is_static and is_slow:
                self._cluster.suspect(member, f"its health check takes longer than {slow_s:g} s")
            if process not in self._running and self._is_due(member):
                task = asyncio.create_task(self._probe(member))
                self._running[process], self._begun_s[process] = task, self._clock()
                task.add_done_callback(lambda _, done=process: self._running.pop(done))  # type: ignore[misc]

    def _is_due(self, member: Member) -> bool:
        since_s = self._clock() - self._probed_s.get(member.info.instance_id, float("-inf"))
        if member.is_up and not member.is_static:
            return member.suspect_reason is SuspectReason.SILENT and since_s >= self._config.silent_probe_secs
        is_settled = member.is_up or member.info.instance_id in self._unfit
        config = self._config
        return since_s >= (config.health_check_interval_secs if is_settled else config.unready_probe_secs)

    async def _probe(self, member: Member) -> None:
        info = member.info
        try:
            # Registered instances have shown that they serve.
            if member.is_static or member.state is State.DOWN:
                await self._get(info.url, "/health", self._config.health_check_timeout_secs)
            server_info = await self._server_info(info, is_new=not member.is_up)
            self._unfit.discard(info.instance_id)
        except TokenizerMismatch as error:
            self._unfit.add(info.instance_id)
            self._cluster.lost_contact(info.instance_id, info.epoch, error.reason)
        except _PROBE_ERRORS as error:
            refused = isinstance(getattr(error, "os_error", None), ConnectionRefusedError)
            reason = f"{info.url}: {describe(error)}"
            self._cluster.lost_contact(info.instance_id, info.epoch, reason, has_exited=refused)
        else:
            self._cluster.joined(info.instance_id, info.epoch, server_info)
        finally:
            self._probed_s[info.instance_id] = self._clock()

    async def _server_info(self, info: InstanceInfo, *, is_new: bool) -> ServerInfo:
        """The server's information. Raises TokenizerMismatch if it does not fit its model's other servers."""
        url = info.url
        model_page, server_page, models_page, takes_empty_text = await asyncio.gather(
            self._get(url, "/model_info", self._config.server_info_timeout_secs),
            self._get(url, "/server_info", self._config.server_info_timeout_secs),
            self._get(url, "/v1/models", self._config.server_info_timeout_secs),
            self._takes_empty_text(url),
        )
        server_info = read_server_info(url, info.role, model_page, server_page, models_page)
        if reason := incompatibility(info.instance_id, server_info, self._cluster.up):
            raise TokenizerMismatch(url, reason)
        if is_new:
            await self._tokenizers.admit(
                info.instance_id,
                server_info.model,
                server_info.model_path,
                json.loads(server_page),
                lambda body: self._tokenize(url, body),
            )
        return replace(server_info, takes_empty_text=takes_empty_text)

    async def _tokenize(self, url: str, body: JsonObject) -> object:
        """The answer of the server's /v1/tokenize; None if it refuses."""
        timeout = aiohttp.ClientTimeout(total=self._config.server_info_timeout_secs)
        async with self._session.post(url + "/v1/tokenize", json=body, timeout=timeout) as response:
            return await response.json() if response.status == 200 else None

    async def _takes_empty_text(self, url: str) -> bool:
        """True if the tokenizer adds a token, such as BOS, to every text; False if unknown."""
        timeout = aiohttp.ClientTimeout(total=self._config.server_info_timeout_secs)
        async with self._session.post(url + "/v1/tokenize", json={"prompt": ""}, timeout=timeout) as response:
            return response.status == 200 and bool((await response.json())["count"])

    async def _get(self, url: str, path: str, timeout_s: float) -> bytes:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=2.0)
        async with self._session.get(url + path, timeout=timeout) as response:
            body = await response.read()
            if response.status != 200:
                raise InstanceLost(url, f"{path} answers {response.status}")
            return body


def incompatibility(instance: InstanceId, server_info: ServerInfo, ready: ClusterSnapshot) -> str | None:
    """Why an instance cannot serve its model together with the ready instances; None if it can."""
    for other in ready.serving(server_info.model).all():
        known = None not in (server_info.page_size, other.server_info.page_size)
        if known and other.instance_id != instance and server_info.page_size != other.server_info.page_size:
            return (
                f"its page size is {server_info.page_size}, but {other.instance_id}, which also serves "
                f"{server_info.model}, has {other.server_info.page_size}: they cannot share blocks"
            )
    return None
