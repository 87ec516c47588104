"""The dashboard at /ui and its data as JSON: the cluster now, hot prefixes, recent requests.

    /ui  /ui/app.js, style.css ...      files of this package; the page loads no others
    /ui/state                           all data that the page polls
    /tree/hottest  /requests            parts of it, for programs
    /requests/RID                       one request, with the decision that placed it

All of them only read. The page shows values as text, never as HTML: clients choose ids and prompts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.resources import files
from operator import add

import msgspec
from aiohttp import web

from memserve import __version__
from memserve.core.block_addr import LOCAL_TIERS
from memserve.core.errors import BadRequest
from memserve.core.ids import InstanceId, server_of
from memserve.router.admission.controller import AdmissionController
from memserve.router.cluster.member import Member
from memserve.router.http.exchange import json_response
from memserve.router.http.handlers.state import StateView
from memserve.router.http.handlers.workers import describe_member
from memserve.router.records import HotPrefix, RequestRecord
from memserve.router.request import JsonObject, encode_json
from memserve.router.tokenization.text_keys import BLOCK_TOKENS
from memserve.scheduling.explain import explained
from memserve.scheduling.prompt_tree.records import TierCounts

PAGE_FILES = {
    "index.html": "text/html",
    "app.js": "text/javascript",
    "draw.js": "text/javascript",
    "explain.js": "text/javascript",
    "style.css": "text/css",
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
DATA_HEADERS = {"Cache-Control": "no-store"}
MAX_PREFIXES = 100
MAX_REQUESTS = 1000


class Dashboard:
    """Serves these endpoints. Event loop thread only."""

    def __init__(self, state: StateView, policies: Mapping[str, str], admission: AdmissionController) -> None:
        self._state = state
        self._admission = admission
        self._policies = policies
        self._started_s = time.time()
        folder = files("memserve.router.http.handlers").joinpath("ui")
        self._files = {name: folder.joinpath(name).read_bytes() for name in PAGE_FILES}

    async def page(self, _: web.Request) -> web.Response:
        """The page."""
        return self._file("index.html")

    async def file(self, request: web.Request) -> web.Response:
        """A file of the page. Raises BadRequest (404) for any other name."""
        name = request.match_info["file"]
        if name not in PAGE_FILES:
            raise BadRequest(f"/ui has no file {name}", status=404)
        return self._file(name)

    async def state(self, _: web.Request) -> web.Response:
        """All data of the page but explanations."""
        state, now_s = self._state, time.monotonic()
        stats = state.synchronizer.synced_tree().stats()
        page: JsonObject = {
            "now_s": time.time(),
            "version": __version__,
            "uptime_s": round(time.time() - self._started_s, 1),
            "reason_unready": state.cluster.snapshot.unavailable_reason(),
            "policies": self._policies,
            "shows_prompts": state.telemetry.prefixes.keeps_samples,
            "waiting": self._admission.queue.num_waiting,
            "tree_blocks": stats.blocks,
            "instances": self._instances(stats.instances),
            "hottest": self._hottest(12, now_s),
            "requests": [_described(one) for one in state.telemetry.requests.newest(50)],
            "series": state.telemetry.series.points(),
        }
        return _page(page)

    async def hottest(self, request: web.Request) -> web.Response:
        """The prefixes that most recent prompts share, and their holders; `?n=20`."""
        num = _number(request, "n", 20, MAX_PREFIXES)
        return _page({"prefixes": self._hottest(num, time.monotonic())})

    async def requests(self, request: web.Request) -> web.Response:
        """Requests that ended recently, newest first; `?n=100`; `?faults=1`: only 5xx answers."""
        num = _number(request, "n", 100, MAX_REQUESTS)
        only_faults = request.query.get("faults", "0") != "0"
        found = self._state.telemetry.requests.newest(num, only_faults=only_faults)
        return _page({"requests": [_described(one) for one in found]})

    async def request(self, request: web.Request) -> web.Response:
        """One request by rid or x-request-id, and the decision that placed it. Raises BadRequest (404)."""
        name = request.match_info["rid"]
        one = self._state.telemetry.requests.find(name)
        if one is None:
            message = f"no recent request has the rid or x-request-id {name}: only the last ones are kept"
            raise BadRequest(message, field="rid", status=404)
        decision: JsonObject | None = None
        if one.decision is not None:
            decision = explained(one.decision, one.unknown)
        return _page({**_described(one), "decision": decision})

    # ---- parts

    def _instances(self, held: Mapping[InstanceId, TierCounts]) -> list[JsonObject]:
        """All instances, memory instances (which hold blocks and serve no requests) included."""
        blocks: dict[InstanceId, TierCounts] = {}
        for name, one in held.items():
            server = server_of(InstanceId(name.partition("#")[0]))
            known = blocks.get(server, (0,) * len(one))
            blocks[server] = tuple(map(add, known, one))
        pools = self._reported()
        members = [
            self._blocks(it.info.instance_id, blocks, pools) | self._member(it)
            for it in self._state.cluster.members()
        ]
        memories = [
            {"instance_id": name, "role": "memory", "state": "ready", **self._blocks(name, blocks, pools)}
            for name in self._state.pools.memories()
        ]
        return members + memories

    def _member(self, member: Member) -> JsonObject:
        name = member.info.instance_id
        load = self._state.scheduler.load(name)
        tokens, page = (
            (member.load and member.load.max_tokens),
            (member.server_info and member.server_info.page_size),
        )
        return {
            **describe_member(member),
            "breaker": self._state.breakers.state(name, member.info.epoch),
            "running": self._state.scheduler.num_running(name),
            "queued": load.queued,
            "queued_s": round(load.queued_s, 4),
            "hbm_capacity": tokens // page if tokens and page else None,
        }

    def _reported(self) -> dict[tuple[InstanceId, str], tuple[int, int]]:
        """Blocks in use and in total, by server and tier, summed over the pools that report both."""
        found: dict[tuple[InstanceId, str], tuple[int, int]] = {}
        for pool in self._state.pools.members():
            for tier in pool.tiers:
                if tier.num_total is not None and tier.num_free is not None:
                    key = server_of(pool.info.instance_id), tier.tier
                    used, total = found.get(key, (0, 0))
                    found[key] = used + tier.num_total - tier.num_free, total + tier.num_total
        return found

    def _blocks(
        self,
        name: InstanceId,
        held: Mapping[InstanceId, TierCounts],
        reported: Mapping[tuple[InstanceId, str], tuple[int, int]],
    ) -> JsonObject:
        """Blocks and capacity of an instance by tier: as its pools report them, else by the tree."""
        one = held.get(name)
        found: JsonObject = {}
        for tier in LOCAL_TIERS:
            label = tier.name.lower()
            used, total = reported.get((name, label), (one and one[tier], None))
            found |= {f"{label}_blocks": used, f"{label}_capacity": total}
        return found

    def _hottest(self, num: int, now_s: float) -> list[JsonObject]:
        found = self._state.telemetry.prefixes.hottest(num, now_s)
        return [self._prefix(one, self._state.synchronizer.synced_tree().holders(one.key)) for one in found]

    def _prefix(self, one: HotPrefix, holders: Mapping[InstanceId, TierCounts]) -> JsonObject:
        sizes = (it.server_info.page_size for it in self._state.cluster.up.all() if it.instance_id in holders)
        page_tokens = BLOCK_TOKENS if one.by_text else next(filter(None, sizes), None)
        return {
            "key": one.key.hex()[:16],
            "blocks": one.blocks,
            "tokens": page_tokens and one.blocks * page_tokens,
            "by_text": one.by_text,
            "prompts": round(one.weight, 1),
            "sample": one.sample,
            "holders": [
                {"instance": name, "tier": next(tier.name.lower() for tier in LOCAL_TIERS if held[tier])}
                for name, held in holders.items()
            ],
        }

    def _file(self, name: str) -> web.Response:
        return web.Response(
            body=self._files[name], content_type=PAGE_FILES[name], charset="utf-8", headers=PAGE_HEADERS
        )


def _described(one: RequestRecord) -> JsonObject:
    """The JSON of a request, without its decision."""
    described: JsonObject = msgspec.structs.asdict(one)
    del described["decision"]
    described["instances"] = str(described.pop("route"))
    if one.decision is not None:
        chosen = one.decision.chosen
        described["expected_tokens"] = one.decision.context.cached_tokens(chosen.cached_blocks)
    return described


def _number(request: web.Request, name: str, default: int, most: int) -> int:
    """A query parameter. Raises BadRequest if it is not a whole number from 1 to `most`."""
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= most):
        raise BadRequest(f"{text[:20]} is not a whole number from 1 to {most}", field=name)
    return int(text)


def _page(page: JsonObject) -> web.Response:
    return json_response(encode_json(page), 200, DATA_HEADERS)
