"""Endpoints to list, add, drain, change and remove instances.

    GET    /workers              all instances, their pools, and the caching mode
    POST   /workers              {"url", "role", "bootstrap_port"}: add a server that does not register
    GET    /workers/ID           one instance
    DELETE /workers/ID           drain it briefly and remove it; only servers that were added by URL
    POST   /workers/ID/drain     {"timeout_s"}: send it no new requests; answered when the last one has ended
                                 and its blocks are evacuated
    DELETE /workers/ID/drain     send it requests again
    POST   /workers/ID/role      {"role", "timeout_s", "force"}: drain it, and restart it in another role
    POST   /add_worker?url=  /remove_worker?url=    GET /list_workers    as sglang-router has them

ID is an instance's id or its URL, percent-encoded or not. Does not call the instances.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import Annotated, Literal, TypeVar

import msgspec
from aiohttp import web

from memserve.core.errors import BadRequest, ConfigError
from memserve.core.ids import InstanceId
from memserve.router.cluster.control import agreed_caching
from memserve.router.cluster.discovery.static import DEFAULT_BOOTSTRAP_PORT, server_url, static_server
from memserve.router.cluster.drain import DrainManager, DrainStatus
from memserve.router.cluster.member import Member
from memserve.router.cluster.pools import PoolMember
from memserve.router.cluster.roles import Phase, RoleChange, RoleChanges
from memserve.router.http.exchange import json_response
from memserve.router.http.handlers.state import StateView
from memserve.router.request import JsonObject, encode_json
from memserve.wire.messages import InstanceInfo, Role, TierBlocks

T = TypeVar("T")

MAX_WAIT_S = 86400
_FIELD = re.compile(r"(?:field `|at `\$\.)(\w+)")


class AddWorker(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /workers`."""

    url: str
    role: Literal["prefill", "decode", "colocated"] = "colocated"
    bootstrap_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    """The --disaggregation-bootstrap-port of a prefill."""

    def info(self) -> InstanceInfo:
        """The server, as the command line would add it. Raises BadRequest with the field at fault."""
        role, port = Role(self.role), self.bootstrap_port
        if role is Role.PREFILL:
            port = port or DEFAULT_BOOTSTRAP_PORT
        elif port is not None:
            raise BadRequest("only a prefill server has a bootstrap port", field="bootstrap_port")
        try:
            return static_server(self.url, role, port)
        except ConfigError as error:
            raise BadRequest(str(error), field="url") from error


class DrainRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /workers/ID/drain`."""

    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_WAIT_S)] = 30.0


class RoleRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /workers/ID/role`."""

    role: Literal["prefill", "decode", "colocated"]
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_WAIT_S)] = 120.0
    """For its requests to end, and as long again for its restart."""
    force: bool = False
    """Change the role even if no other instance can serve meanwhile."""


class WorkersApi:
    """Serves these endpoints. Event loop thread only."""

    def __init__(self, state: StateView, drains: DrainManager, roles: RoleChanges) -> None:
        self._state = state
        self._cluster = state.cluster
        self._drains = drains
        self._roles = roles

    async def show_all(self, _: web.Request) -> web.Response:
        """All instances, the pools with which they exchange blocks, and the caching mode."""
        pools = self._state.pools
        page: JsonObject = {
            "caching": agreed_caching(self._cluster, pools),
            "workers": [self._describe(member) for member in self._cluster.members()],
            "followed": {name: how.mode for name, how in self._state.subscriptions.stats().items()},
            "pools": [_describe_pool(member, pools.age_s(member)) for member in pools.members()],
        }
        return _page(page)

    async def list_urls(self, _: web.Request) -> web.Response:
        """The URLs of all instances."""
        return _page({"urls": [member.info.url for member in self._cluster.members()]})

    async def show(self, request: web.Request) -> web.Response:
        """One instance. Raises BadRequest (404) for an unknown id or URL."""
        return _page(self._describe(self._member(request.match_info["id"])))

    async def add(self, request: web.Request) -> web.Response:
        """Add a server: 201, or 200 if it was added before. It gets requests once a probe succeeds."""
        return self._add(_decoded(await request.read(), AddWorker).info())

    async def add_url(self, request: web.Request) -> web.Response:
        """Add a colocated server."""
        return self._add(AddWorker(_url_of(request)).info())

    async def remove(self, request: web.Request) -> web.Response:
        """Drain a server for `?timeout_s=`, and remove it; its running requests may still end."""
        return await self._remove(request, request.match_info["id"])

    async def remove_url(self, request: web.Request) -> web.Response:
        """Drain and remove a server, by URL."""
        return await self._remove(request, _url_of(request))

    async def drain(self, request: web.Request) -> web.Response:
        """Send an instance no new requests.

        200 when it has none left and its blocks are evacuated, or in time; with `?wait=0`, 202 at once.
        """
        body = await request.read()
        wanted = _decoded(body, DrainRequest) if body else DrainRequest()
        memory = InstanceId(request.match_info["id"])
        if memory in self._state.pools.memories():
            emptied = await self._drains.empty(memory)
            return _page({"instance_id": memory, "state": "memory", **_describe_drain(emptied)})
        member = self._member(request.match_info["id"])
        is_awaited = request.query.get("wait", "1") != "0"
        self._drains.begin(member)
        drained = await self._drains.wait(member, wanted.timeout_s if is_awaited else 0.0)
        state = member.state if self._is_there(member) else "gone"
        page = {**_id_of(member), "state": state, **_describe_drain(drained)}
        return _page(page, 200 if is_awaited else 202)

    async def undrain(self, request: web.Request) -> web.Response:
        """Send an instance requests again. Idempotent."""
        member = self._member(request.match_info["id"])
        self._drains.end(member)
        return _page(self._describe(member))

    async def change_role(self, request: web.Request) -> web.Response:
        """Change the role of a server.

        200 when it serves in the new role or the change failed; with `?wait=0`, 202 at once. Raises
        BadRequest (409, with the reason) if the role cannot be changed.
        """
        member = self._member(request.match_info["id"])
        wanted = _decoded(await request.read(), RoleRequest)
        role = Role(wanted.role)
        if role is member.info.role:
            return _page(
                {**_id_of(member), **_describe_change(RoleChange(member.info.url, role, Phase.DONE))}
            )
        if reason := self._roles.rejection_reason(member, role, is_forced=wanted.force):
            raise BadRequest(f"{member.info.instance_id} cannot become {role}: {reason}", status=409)
        change = self._roles.begin(member, role, wanted.timeout_s)
        is_awaited = request.query.get("wait", "1") != "0"
        if is_awaited:
            await self._roles.wait(change)
        return _page(
            {**_id_of(self._cluster.find(change.url) or member), **_describe_change(change)},
            200 if is_awaited else 202,
        )

    def _add(self, info: InstanceInfo) -> web.Response:
        is_new = info.url not in self._cluster.static_urls()
        known = self._cluster.add_static(info)
        if known != info:
            raise BadRequest(
                f"{known.url} is known as {known.role}, bootstrap port {known.bootstrap_port}: "
                "remove it before you add it with another role or port",
                field="role" if known.role is not info.role else "bootstrap_port",
                status=409,
            )
        return _page(self._describe(self._member(info.url)), 201 if is_new else 200)

    async def _remove(self, request: web.Request, name: str) -> web.Response:
        timeout_s = _seconds(request.query.get("timeout_s", "10"))  # for the server to finish its requests
        member = self._member(name)
        if not member.is_static:
            raise BadRequest(
                f"{member.info.instance_id} registers itself, and would do so again: drain it with "
                "POST /workers/ID/drain, then stop its process",
                status=409,
            )
        self._drains.begin(member)
        drained = await self._drains.wait(member, timeout_s)
        if self._is_there(member) and not member.is_draining:
            raise BadRequest(f"{name} was undrained meanwhile", status=409)
        self._cluster.remove_static(member.info.url)
        return _page({**_id_of(member), "removed": True, **_describe_drain(drained)})

    def _is_there(self, member: Member) -> bool:
        """True if the instance is still the same process."""
        return self._cluster.find(member.info.instance_id) is member

    def _member(self, name: str) -> Member:
        member = self._cluster.find(name)
        if member is None and "://" in name:
            with suppress(ConfigError):
                member = self._cluster.find(server_url(name))
        if member is None:
            raise BadRequest(f"no worker has the id or the URL {name}", field="id", status=404)
        return member

    def _describe(self, member: Member) -> JsonObject:
        breaker = self._state.breakers.state(member.info.instance_id, member.info.epoch)
        drained = _describe_drain(self._drains.status(member))
        change = self._roles.change_of(member.info.url)
        becoming = None if change is None else _describe_change(change)
        return {**describe_member(member), "breaker": breaker, **drained, "role_change": becoming}


def describe_member(member: Member) -> JsonObject:
    """The JSON of an instance."""
    info, facts = member.info, member.server_info
    return {
        "instance_id": info.instance_id,
        "role": info.role,
        "url": info.url,
        "bootstrap_port": info.bootstrap_port,
        "state": member.state,
        "draining": member.is_draining,
        "reason": member.reason or None,
        "registered": not member.is_static,
        "load": None if member.load is None else msgspec.to_builtins(member.load),
        "caching": None if member.is_static else info.caching,
        "model": facts.model if facts else None,
        "context_tokens": facts.context_tokens if facts else None,
        "vocab_size": facts.vocab_size if facts else None,
        "page_size": facts.page_size if facts else None,
    }


def _describe_pool(member: PoolMember, age_s: float) -> JsonObject:
    info = member.info
    return {
        "instance_id": info.instance_id,
        "epoch": f"{info.epoch:016x}",
        "role": info.role,
        "caching": info.caching,
        "address": info.address,
        "layout": info.layout or None,
        "bootstrap": info.bootstrap or None,
        "tiers": {one.tier: _describe_tier(one) for one in member.tiers},
        "age_s": round(age_s, 1),
    }


def _describe_change(change: RoleChange) -> JsonObject:
    drained = None if change.drained is None else _describe_drain(change.drained)
    return {"role": change.role, "stage": change.phase, "reason": change.reason or None, "drain": drained}


def _describe_tier(tier: TierBlocks) -> JsonObject:
    return {"cached_blocks": tier.num_cached, "free_blocks": tier.num_free, "blocks": tier.num_total}


def _describe_drain(drained: DrainStatus) -> JsonObject:
    evacuation = drained.evacuation
    return {
        "drained": drained.is_done,
        "running": drained.num_running,
        "evacuated": None
        if evacuation is None
        else {
            "blocks": evacuation.num_blocks,
            "bytes": evacuation.num_bytes,
            "known_elsewhere": evacuation.num_known,
            "left": evacuation.num_left,
            "seconds": round(evacuation.seconds, 3),
            "reason": evacuation.reason or None,
        },
    }


def _decoded(body: bytes, kind: type[T]) -> T:
    """Raises BadRequest with the field at fault."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        found = _FIELD.search(str(error))
        raise BadRequest(str(error), field=found.group(1) if found else None) from error


def _url_of(request: web.Request) -> str:
    if "url" not in request.query:
        raise BadRequest("url is missing: write ?url=http://HOST:PORT", field="url")
    return request.query["url"]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_WAIT_S:
        raise BadRequest(f"{text} is not a number of seconds from 0 to {MAX_WAIT_S}", field="timeout_s")
    return seconds


def _id_of(member: Member) -> JsonObject:
    return {"instance_id": member.info.instance_id}


def _page(page: JsonObject, status: int = 200) -> web.Response:
    return json_response(encode_json(page), status)
