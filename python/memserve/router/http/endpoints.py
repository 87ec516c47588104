"""The table of endpoints: path, method, permission, schemas, and how each is dispatched.

Routes, permissions and the OpenAPI document follow from it. An endpoint that the router only passes on to
a server is one `_passed_on` entry. Routes are matched in the order of the table.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from aiohttp import web

from memserve.router.field_kinds import Schema
from memserve.router.http import schemas
from memserve.router.http.handlers.dashboard import MAX_PREFIXES, MAX_REQUESTS, PAGE_FILES, Dashboard
from memserve.router.http.handlers.generate import GenerateHandler, PassthroughHandler
from memserve.router.http.handlers.info import InfoHandlers
from memserve.router.http.handlers.probes import ProbeHandlers
from memserve.router.http.handlers.workers import (
    MAX_WAIT_S,
    AddWorker,
    DrainRequest,
    RoleRequest,
    WorkersApi,
)
from memserve.router.http.schemas import INTEGER, Object, ref

TEXT, EVENTS, HTML, ANY = "text/plain", "text/event-stream", "text/html", "*/*"


class Permission(Enum):
    """The key that a request to an endpoint needs."""

    OPEN = auto()
    """None: liveness and counters."""
    CLIENT = auto()
    """A client's."""
    SHARED = auto()
    """A client's, or with several tenants an admin's: the endpoint reaches the requests of all tenants."""
    ADMIN = auto()
    """An admin's: the endpoint shows or changes the cluster."""


OPEN, CLIENT, SHARED, ADMIN = Permission


@dataclass(frozen=True, slots=True)
class HttpEndpoint:
    """One method of one path."""

    method: str
    path: str
    handler: Callable[[Any, web.Request], Awaitable[web.StreamResponse]]
    """A method of one of the classes in `handlers`, unbound."""
    summary: str
    permission: Permission = ADMIN
    answer: Any = Object
    """The JSON answer: a type or a schema."""
    statuses: Sequence[int] = (200,)
    """The statuses that have it."""
    media: str | None = None
    """The content type of a 200 instead of JSON; for `EVENTS`, beside JSON."""
    body: Any = None
    """The JSON body: a type or a schema; None: the endpoint takes no body."""
    needs_body: bool = True
    query: Mapping[str, Schema] = field(default_factory=dict)
    required: Sequence[str] = ()
    """Names of the query's required parameters."""
    reads_body: bool = False
    """The handler reads the body itself, up to --max-body-bytes; other bodies are small, and read before."""
    changes: bool = False
    """A GET that changes the cluster."""

    @property
    def pattern(self) -> str:
        """The path as aiohttp routes it: parameters may contain slashes."""
        return self.path.replace("}", ":.+}")


def _generating(method: str, path: str, summary: str, body: str, answer: Any = Object) -> HttpEndpoint:
    """An endpoint of `Api`: the router reads the prompt and selects a pair."""
    handler = GenerateHandler.handle_web
    return HttpEndpoint(
        method, path, handler, summary, CLIENT, answer, media=EVENTS, body=ref(body), reads_body=True
    )


def _passed_on(path: str, summary: str, required: Mapping[str, Schema]) -> HttpEndpoint:
    """An endpoint whose requests one colocated server answers. The router reads only the model.

    `required`: the fields of its body that the OpenAPI document shows, beside the model.
    """
    handler = PassthroughHandler.handle
    body = schemas.obj(required, {"model": schemas.MODEL})
    return HttpEndpoint("POST", path, handler, summary, CLIENT, body=body, reads_body=True)


_SWITCH: Schema = {"enum": ["0", "1"]}
_SECONDS: Schema = {"type": "number", "minimum": 0}
_WAIT = {"wait": _SWITCH}
_URL = {"url": {"type": "string", "format": "uri"}}
_TIMEOUT = {"timeout_s": {**_SECONDS, "maximum": MAX_WAIT_S}}
_GENERATE = Object | list[Object]
_ANY_BODY = {"anyOf": [ref("Generate"), ref("Chat"), ref("Completion")]}


def _number(most: int) -> dict[str, Schema]:
    return {"n": {**INTEGER, "minimum": 1, "maximum": most}}


_info, _probes, _workers, _ui = InfoHandlers, ProbeHandlers, WorkersApi, Dashboard

ENDPOINTS: tuple[HttpEndpoint, ...] = (
    HttpEndpoint("GET", "/health", _info.live, "Liveness of the router", OPEN, media=TEXT),
    HttpEndpoint("GET", "/liveness", _info.live, "Liveness of the router", OPEN, media=TEXT),
    HttpEndpoint(
        *("GET", "/readiness", _info.ready, "Readiness: can the cluster serve a request?", OPEN),
        answer=schemas.Readiness,
        statuses=(200, 503),
    ),
    *(
        HttpEndpoint("GET", path, _probes.serving, "200 if the cluster can serve a request", OPEN, media=TEXT)
        for path in ("/health_generate", "/ready", "/ping")
    ),
    HttpEndpoint("GET", "/version", _probes.version, "The router's version", OPEN, schemas.Version),
    HttpEndpoint("GET", "/metrics", _info.metrics, "All metrics, in Prometheus' format", OPEN, media=TEXT),
    HttpEndpoint("GET", "/openapi.json", _info.openapi, "This document", OPEN),
    _generating("POST", "/generate", "Generate, as SGLang", "Generate", _GENERATE),
    _generating("PUT", "/generate", "Generate, as SGLang", "Generate", _GENERATE),
    _generating("POST", "/v1/chat/completions", "Answer a chat, as OpenAI", "Chat"),
    _generating("POST", "/v1/completions", "Complete a prompt, as OpenAI", "Completion"),
    _passed_on("/v1/embeddings", "Embed texts, as OpenAI", {"input": schemas.PROMPT}),
    HttpEndpoint(
        *("POST", "/explain", GenerateHandler.explain),
        "The instances that a request would be sent to, and why; the request is not sent",
        CLIENT,
        answer=schemas.DecisionReport,
        body=_ANY_BODY,
        reads_body=True,
    ),
    HttpEndpoint("GET", "/v1/models", _info.models, "The models served here", CLIENT, schemas.ModelList),
    HttpEndpoint("GET", "/v1/models/{model}", _info.model, "One model", CLIENT, schemas.ModelCard),
    HttpEndpoint("GET", "/model_info", _info.model_info, "A server's description of its model", CLIENT),
    HttpEndpoint("GET", "/get_model_info", _info.model_info, "The same as /model_info", CLIENT),
    HttpEndpoint(
        *("GET", "/server_info", _info.server_info),
        "A server's description of itself; admins get all servers' under `workers`",
        CLIENT,
    ),
    HttpEndpoint("GET", "/get_server_info", _info.server_info, "The same as /server_info", CLIENT),
    HttpEndpoint(
        *("GET", "/v1/loads", _probes.loads),
        "The loads of all servers, as SGLang: one entry per instance and data-parallel rank",
        SHARED,
        schemas.LoadList,
        query={"include": schemas.STRING},
    ),
    HttpEndpoint(
        *("GET", "/get_load", _probes.get_load, "The same, as older versions of SGLang", SHARED),
        list[Object],
    ),
    *(
        HttpEndpoint(
            *(method, "/flush_cache", _info.flush_cache, "Flush the caches of all servers"),
            query={"timeout": _SECONDS},
            media=TEXT,
            changes=True,
        )
        for method in ("GET", "POST")
    ),
    HttpEndpoint(
        *("POST", "/abort_request", _info.abort_request, "Abort a request, as SGLang", CLIENT),
        media=TEXT,
        body=schemas.Abort,
    ),
    HttpEndpoint(
        *("POST", "/concate_and_append_request", _info.concatenate),
        "Accept the frontend language's hint to join branches",
        CLIENT,
        schemas.Success,
        body=schemas.Concatenation,
    ),
    HttpEndpoint(
        *("GET", "/tree", _info.tree, "The prompt tree: blocks, holders, audit results"),
        query={"digest": _SWITCH},
    ),
    HttpEndpoint(
        *("GET", "/tree/hottest", _ui.hottest),
        "The prefixes that most recent prompts share, and their holders",
        answer=schemas.PrefixList,
        query=_number(MAX_PREFIXES),
    ),
    HttpEndpoint(
        *("GET", "/requests", _ui.requests, "Requests that ended recently, newest first"),
        answer=schemas.RecentRequests,
        query={**_number(MAX_REQUESTS), "faults": _SWITCH},
    ),
    HttpEndpoint(
        *("GET", "/requests/{rid}", _ui.request),
        "One request by rid or x-request-id, and the decision that placed it",
        answer=schemas.RequestDetail,
    ),
    HttpEndpoint("GET", "/ui", _ui.page, "The dashboard", media=HTML),
    HttpEndpoint("GET", "/ui/state", _ui.state, "The data of the dashboard", answer=schemas.DashboardState),
    HttpEndpoint("GET", "/ui/{file}", _ui.file, "A file of the dashboard", media=ANY),
    HttpEndpoint("GET", "/workers", _workers.show_all, "All instances", answer=schemas.WorkerList),
    HttpEndpoint(
        *("POST", "/workers", _workers.add, "Add a server: 201, or 200 if it was added before"),
        answer=schemas.WorkerStatus,
        statuses=(200, 201),
        body=AddWorker,
    ),
    HttpEndpoint(
        *("POST", "/workers/{id}/drain", _workers.drain),
        "Send an instance no new requests; answered when it has none left, or the time is over",
        answer=schemas.DrainResult,
        statuses=(200, 202),
        body=DrainRequest,
        needs_body=False,
        query=_WAIT,
    ),
    HttpEndpoint(
        *("DELETE", "/workers/{id}/drain", _workers.undrain, "Send an instance requests again"),
        answer=schemas.WorkerStatus,
    ),
    HttpEndpoint(
        *("POST", "/workers/{id}/role", _workers.change_role, "Make a prefill a decode, or back"),
        answer=schemas.RoleResult,
        statuses=(200, 202),
        body=RoleRequest,
        query=_WAIT,
    ),
    HttpEndpoint(
        *("GET", "/workers/{id}", _workers.show, "One instance, by id or URL"), answer=schemas.WorkerStatus
    ),
    HttpEndpoint(
        *("DELETE", "/workers/{id}", _workers.remove, "Drain and remove a server that was added by URL"),
        answer=schemas.RemoveResult,
        query=_TIMEOUT,
    ),
    HttpEndpoint("GET", "/list_workers", _workers.list_urls, "The servers' URLs", answer=schemas.UrlList),
    HttpEndpoint(
        *("POST", "/add_worker", _workers.add_url, "Add a colocated server"),
        answer=schemas.WorkerStatus,
        statuses=(200, 201),
        query=_URL,
        required=("url",),
    ),
    HttpEndpoint(
        *("POST", "/remove_worker", _workers.remove_url, "Drain and remove a server that was added by URL"),
        answer=schemas.RemoveResult,
        query={**_URL, **_TIMEOUT},
        required=("url",),
    ),
)

PERMISSIONS = {one.path: one.permission for one in ENDPOINTS if one.permission is not ADMIN}
"""By path; all others are an admin's. `/server_info` and `/readiness` show admins more."""
READS_BODY = frozenset(one.path for one in ENDPOINTS if one.reads_body)
CHANGES_BY_GET = frozenset(one.path for one in ENDPOINTS if one.changes)
FILES: Schema = {"enum": list(PAGE_FILES)}


def routes(*parts: object) -> list[web.RouteDef]:
    """The routes of the table. `parts` has an instance of each class in it, whose handlers are used."""
    return [web.route(one.method, one.pattern, _bound(one.handler, parts)) for one in ENDPOINTS]


def _bound(handler: Any, parts: Sequence[object]) -> Any:
    return next(handler.__get__(part) for part in parts if handler in vars(type(part)).values())
