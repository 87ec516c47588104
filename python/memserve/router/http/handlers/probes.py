"""Pages of an SGLang server that probes and load balancers ask for, answered for the whole cluster.

GET /health_generate  /ready  /ping   200 without a body if a request can be served now, else 503. The
                                      router generates nothing for it: it probes the servers anyway.
GET /v1/loads   one entry per instance and data-parallel rank, as the servers report them, with the
                instance's id; an instance that does not answer has none
GET /get_load   the same, in the shape that older versions of SGLang have
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from urllib.parse import urlencode

import aiohttp
import msgspec
from aiohttp import web

from memserve import __version__
from memserve.core.errors import BadRequest, MemServeError
from memserve.router.errors import NoRoute, refusal
from memserve.router.http.exchange import json_response
from memserve.router.http.handlers.info import ask, unavailable
from memserve.router.http.handlers.state import StateView
from memserve.router.request import JsonObject, encode_json


class _Loads(msgspec.Struct):
    """A server's answer to GET /v1/loads; its other fields describe its machine."""

    loads: list[JsonObject]


class ProbeHandlers:
    """Serves these endpoints. Event loop thread only."""

    def __init__(self, state: StateView, session: aiohttp.ClientSession) -> None:
        self._cluster = state.cluster
        self._session = session

    async def serving(self, _: web.Request) -> web.Response:
        """200 if a request can be served now, else 503 with the reason."""
        reason = self._cluster.snapshot.unavailable_reason()
        return web.Response(text="") if reason is None else unavailable(reason)

    async def version(self, _: web.Request) -> web.Response:
        """The router's version."""
        return json_response(encode_json({"version": __version__}))

    async def loads(self, request: web.Request) -> web.Response:
        """The loads of all instances that are up; `?include=` names SGLang's sections.

        Raises BadRequest for a format other than JSON, NoRoute, UpstreamRejected.
        """
        if request.query.get("format", "json") != "json":
            raise BadRequest("the router has the loads as JSON only; see /metrics", field="format")
        loads = await self._loads(request.query.get("include", "all"))
        now = datetime.now(UTC).isoformat()
        return json_response(encode_json({"timestamp": now, "version": __version__, "loads": loads}))

    async def get_load(self, _: web.Request) -> web.Response:
        """The same as a list of numbers of requests and tokens."""
        page = [
            {
                "instance_id": load["instance_id"],
                "dp_rank": load.get("dp_rank", 0),
                "num_reqs": _count(load, "num_running_reqs") + _count(load, "num_waiting_reqs"),
                "num_waiting_reqs": _count(load, "num_waiting_reqs"),
                "num_tokens": _count(load, "num_used_tokens"),
            }
            for load in await self._loads("core")
        ]
        return json_response(encode_json(page))

    async def _loads(self, include: str) -> list[JsonObject]:
        """The entries of all instances that answer, each with its instance's id."""
        instances = self._cluster.up.all()
        if not instances:
            raise NoRoute("no server is ready")
        path = f"/v1/loads?{urlencode({'include': include})}"
        answers = await asyncio.gather(*(ask(self._session, one, "GET", path) for one in instances))
        loads: list[JsonObject] = []
        refused: MemServeError | None = None
        for one, (status, body) in zip(instances, answers, strict=True):
            try:
                if status == 200:
                    entries = msgspec.json.decode(body, type=_Loads).loads
                    loads += [{"instance_id": one.instance_id, **entry} for entry in entries]
                elif 400 <= status < 500:
                    refused = refusal(status, body)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
        if not loads:
            raise refused or NoRoute("no server reports its load")
        return loads


def _count(load: JsonObject, name: str) -> int:
    count = load.get(name, 0)
    return count if isinstance(count, int) else 0
