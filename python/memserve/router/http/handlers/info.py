"""Endpoints about the router and its servers: health, metrics, models, server info, flushing, aborts."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import aiohttp
import msgspec
from aiohttp import web

from memserve import __version__
from memserve.core.block_addr import LOCAL_TIERS
from memserve.router.auth.access import Access
from memserve.router.cluster.instance import Instance
from memserve.router.cluster.member import State
from memserve.router.errors import describe, failure, message_of
from memserve.router.http.exchange import json_response
from memserve.router.http.handlers.state import StateView
from memserve.router.http.handlers.workers import describe_member
from memserve.router.http.schemas import Abort, Concatenation
from memserve.router.request import JsonObject, encode_json

_SECRET = re.compile(r"(api_key|password|secret)$|^launch_command$")

logger = logging.getLogger(__name__)

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus' text format."""


class InfoHandlers:
    """Serves these endpoints. Event loop thread only."""

    def __init__(
        self,
        state: StateView,
        exposition: Callable[[], bytes],
        session: aiohttp.ClientSession,
        access: Access,
        document: Callable[[], bytes],
        abort: Callable[[str | None, Sequence[str] | None], None],
    ) -> None:
        """`exposition` gives all metrics as text; `access` tells admins, who see more.

        `document` gives the answer of /openapi.json; `abort` is `Dispatcher.abort`.
        """
        self._abort = abort
        self._document = document
        self._state = state
        self._access = access
        self._cluster = state.cluster
        self._feed = state.synchronizer
        self._exposition = exposition
        self._session = session
        self._started_s = int(time.time())

    async def live(self, _: web.Request) -> web.Response:
        """200 as long as the router itself runs."""
        return web.Response(text="OK")

    async def ready(self, request: web.Request) -> web.Response:
        """200 if a request can be served now, else 503 with the reason; admins get one per instance."""
        snapshot = self._cluster.snapshot
        reason = snapshot.unavailable_reason()
        unchecked = [str(one.instance_id) for one in snapshot.all() if one.server_info.vocab_size is None]
        page: JsonObject = {
            "ready": reason is None,
            "reason": reason,
            "prefill": len(snapshot.prefills),
            "decode": len(snapshot.decodes),
            "colocated": len(snapshot.colocated),
            "draining": sum(member.state is State.DRAINING for member in self._cluster.members()),
        }
        inside: JsonObject = {
            "not_ready": {
                str(member.info.instance_id): member.reason
                for member in self._cluster.members()
                if member.reason
            },
            "token_ids_not_checked": unchecked,
            "placed_without_tokens": self._state.tokenizers.reasons(),
        }
        if self._access.is_admin(request.headers.get("Authorization")):
            page |= inside
        return json_response(encode_json(page), 200 if reason is None else 503)

    async def openapi(self, _: web.Request) -> web.Response:
        """The OpenAPI document."""
        return json_response(self._document())

    async def tree(self, request: web.Request) -> web.Response:
        """The prompt tree: number of blocks, blocks by holder, results of audits.

        `?digest=1` adds a digest of the blocks by instance and tier, as a server has it on `/mempool`.
        """
        tree = self._feed.synced_tree()
        stats = tree.stats()
        page: JsonObject = asdict(stats)
        page["instances"] = {
            name: {tier.name.lower(): counts[tier] for tier in LOCAL_TIERS}
            for name, counts in stats.instances.items()
        }
        if request.query.get("digest") == "1":
            page["digest"] = {
                name: {tier.name.lower(): (n, f"{xor:016x}") for tier, (n, xor) in tree.digest(name).items()}
                for name in stats.instances
            }
        return json_response(encode_json(page))

    async def metrics(self, _: web.Request) -> web.Response:
        """All metrics."""
        return web.Response(body=self._exposition(), headers={"Content-Type": METRICS_TYPE})

    async def models(self, _: web.Request) -> web.Response:
        """OpenAI's list of models."""
        return json_response(encode_json({"object": "list", "data": list(self._cards().values())}))

    async def model(self, request: web.Request) -> web.Response:
        """One entry of that list."""
        name = request.match_info["model"]
        card = self._cards().get(name)
        if card is None:
            unknown = failure(
                404, f"The model '{name}' does not exist", field="model", code="model_not_found"
            )
            return json_response(unknown.body(), 404)
        return json_response(encode_json(card))

    async def model_info(self, _: web.Request) -> web.Response:
        """The model info of an instance that answers clients (colocated or decode) if there is one."""
        instances = self._cluster.snapshot.all()
        if not instances:
            return unavailable()
        return json_response(instances[0].server_info.model_info)

    async def server_info(self, request: web.Request) -> web.Response:
        """The server info of an instance that answers clients, without its secrets.

        Admins get the info of all servers, under `workers`.
        """
        instances = self._cluster.up.all()
        answers = await asyncio.gather(*(ask(self._session, one, "GET", "/server_info") for one in instances))
        infos = [msgspec.json.decode(body) if status == 200 else {} for status, body in answers]
        infos = [info if isinstance(info := without_secrets(answer), dict) else {} for answer in infos]
        page: JsonObject = {
            **(infos[0] if infos else {}),
            "disaggregation_mode": "null",  # the router answers like a colocated server
            "router": {"version": __version__, "started": self._started_s},
        }
        if self._access.is_admin(request.headers.get("Authorization")):
            page["router"] = {"version": __version__, "started": self._started_s, "members": self._members()}
            page["workers"] = [
                {"instance_id": one.instance_id, "role": one.role, "url": one.url, "server_info": info}
                for one, info in zip(instances, infos, strict=True)
            ]
        return json_response(encode_json(page))

    async def flush_cache(self, request: web.Request) -> web.Response:
        """Flush every instance that is up; 200 if all of them flushed."""
        instances = self._cluster.up.all()
        if not instances:
            return unavailable()
        # Without a query, a server waits 5 s for its requests to end before it flushes.
        path = request.path_qs if request.query_string else "/flush_cache?timeout=5"
        answers = await asyncio.gather(*(ask(self._session, one, "POST", path) for one in instances))
        failed = []
        for one, (status, body) in zip(instances, answers, strict=True):
            if status == 200:
                self._state.subscriptions.record_flush(one.instance_id)
            else:
                failed.append(f"{one.instance_id}: {message_of(status, body)}")
        if failed:
            status = 400 if all(status in (200, 400) for status, _ in answers) else 502
            return json_response(failure(status, "; ".join(failed), retryable=True).body(), status)
        return web.Response(text=f"Cache flushed on {len(instances)} instances.\n")

    async def abort_request(self, request: web.Request) -> web.Response:
        """Abort the tenant's requests of these names; unknown names are ignored, as by SGLang.

        `abort_all` of an admin, or without tenants, reaches all requests of all instances that are up.
        """
        body = await request.read()
        try:
            wanted = msgspec.json.decode(body, type=Abort)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return json_response(failure(400, f"not an abort: {error}").body(), 400)
        authorization, names = request.headers.get("Authorization"), wanted.rid or []
        is_for_all = not self._access.has_tenants or self._access.is_admin(authorization)
        tenant = None if is_for_all else self._access.authenticate(authorization).name
        self._abort(tenant, None if wanted.abort_all else [names] if isinstance(names, str) else names)
        if not (wanted.abort_all and is_for_all):
            return web.Response(text="")
        instances = self._cluster.up.all()
        answers = await asyncio.gather(
            *(ask(self._session, one, "POST", "/abort_request", body) for one in instances)
        )
        status, answer = max(answers, default=(200, b""))
        if status != 200:
            status = status if status < 500 else 502
            return json_response(failure(status, message_of(status, answer)).body(), status)
        return web.Response(text=answer.decode(errors="replace"))

    async def concatenate(self, request: web.Request) -> web.Response:
        """Accept the frontend language's hint to concatenate the KV of forked branches, and do nothing.

        No SGLang server can do it, and none needs to: the program sends the joined text with its next
        call, which is cached and computed then. An error would hang the program: SGLang's client waits
        forever for its next submission after a failed call.
        """
        try:
            msgspec.json.decode(await request.read(), type=Concatenation)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return json_response(failure(400, f"not a concate_and_append request: {error}").body(), 400)
        return json_response(b'{"success": true}')

    def _members(self) -> list[JsonObject]:
        return [describe_member(member) for member in self._cluster.members()]

    def _cards(self) -> dict[str, JsonObject]:
        """OpenAI's model objects by name."""
        return {
            one.server_info.model: {
                "id": one.server_info.model,
                "object": "model",
                "created": self._started_s,
                "owned_by": "sglang",
                "root": one.server_info.model,
                "parent": None,
                "max_model_len": one.server_info.context_tokens,
            }
            for one in reversed(self._cluster.snapshot.all())
        }


def without_secrets(value: object) -> object:
    """A server's info without its secrets: SGLang includes keys, as fields and as flags."""
    if isinstance(value, list):
        return [without_secrets(one) for one in value]
    if isinstance(value, dict):
        return {name: without_secrets(one) for name, one in value.items() if not _SECRET.search(name)}
    return value


async def ask(
    session: aiohttp.ClientSession, instance: Instance, method: str, path: str, body: bytes | None = None
) -> tuple[int, bytes]:
    """Status and body of a server's answer; 502 and the reason if it does not answer."""
    timeout = aiohttp.ClientTimeout(total=10.0)
    headers = {"Content-Type": "application/json"}
    try:
        async with session.request(
            method, instance.url + path, data=body, headers=headers, timeout=timeout
        ) as response:
            return response.status, await response.read()
    except (aiohttp.ClientError, OSError) as error:
        return 502, describe(error).encode()


def unavailable(reason: str = "no server is ready") -> web.Response:
    """The answer while no server can be asked."""
    return json_response(failure(503, reason, retryable=True).body(), 503)
