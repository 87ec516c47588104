"""The router's HTTP API as an OpenAPI document: every endpoint, who may use it, and what it takes and gives.

Kept by hand; a test holds it to the routes that there are. Knows no handlers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from memserve import __version__
from memserve.router.http.handlers.dashboard import MAX_PREFIXES, MAX_REQUESTS, PAGE_FILES
from memserve.router.http.handlers.generate import json_response
from memserve.router.http.handlers.workers import MAX_WAIT_S
from memserve.router.http.openapi_schemas import (
    BOOLEAN,
    INTEGER,
    STRING,
    Schema,
    array,
    obj,
    ref,
    schemas,
)
from memserve.router.http.permissions import LEVELS, Permission
from memserve.router.request import encode_json

JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"
OBJECT: Schema = {"type": "object"}
_HEADERS = {"x-request-id": {"schema": STRING, "description": "the request's own, or the one it was given"}}


@dataclass(frozen=True, slots=True)
class ApiOperation:
    """One method of one path."""

    summary: str
    answers: Mapping[int, Schema] = field(default_factory=lambda: {200: OBJECT})
    """By status, of JSON."""
    body: Schema | None = None
    needs_body: bool = True
    query: Mapping[str, Schema] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    """Of those in the query."""
    other: str | None = None
    """A content type that 200 has instead of JSON; beside it for `EVENTS`."""


_SWITCH: Schema = {"enum": ["0", "1"]}
_URL = {"url": {"type": "string", "format": "uri"}}
_SECONDS = {"timeout_s": {"type": "number", "minimum": 0, "maximum": MAX_WAIT_S}}
_ANSWER: Schema = {"anyOf": [OBJECT, array(OBJECT)]}
_generate = ApiOperation("Generate, as SGLang", {200: _ANSWER}, ref("Generate"), other=EVENTS)
_flush = ApiOperation(
    "Flush the caches of all servers", query={"timeout": {"type": "number", "minimum": 0}}, other=TEXT
)
_model_info = ApiOperation("What a server says of its model")
_server_info = ApiOperation("What a server says of itself; every server's under `workers`")
_live = ApiOperation("Whether the router runs", other=TEXT)

OPERATIONS: dict[tuple[str, str], ApiOperation] = {
    ("GET", "/health"): _live,
    ("GET", "/liveness"): _live,
    ("GET", "/readiness"): ApiOperation(
        "Whether a request can be served", {200: ref("Readiness"), 503: ref("Readiness")}
    ),
    ("GET", "/metrics"): ApiOperation("Everything that is counted, for Prometheus", other=TEXT),
    ("GET", "/openapi.json"): ApiOperation("This document"),
    ("POST", "/generate"): _generate,
    ("PUT", "/generate"): _generate,
    ("POST", "/v1/chat/completions"): ApiOperation(
        "Answer a chat, as OpenAI", {200: OBJECT}, ref("Chat"), other=EVENTS
    ),
    ("POST", "/v1/completions"): ApiOperation(
        "Complete a prompt, as OpenAI", {200: OBJECT}, ref("Completion"), other=EVENTS
    ),
    ("POST", "/explain"): ApiOperation(
        "Where a request would go, and why; nothing is sent",
        {200: ref("Decision")},
        {"anyOf": [ref("Generate"), ref("Chat"), ref("Completion")]},
    ),
    ("GET", "/v1/models"): ApiOperation("The models served here", {200: ref("Models")}),
    ("GET", "/v1/models/{model}"): ApiOperation("One of them", {200: ref("Model")}),
    ("GET", "/model_info"): _model_info,
    ("GET", "/get_model_info"): _model_info,
    ("GET", "/server_info"): _server_info,
    ("GET", "/get_server_info"): _server_info,
    ("GET", "/flush_cache"): _flush,
    ("POST", "/flush_cache"): _flush,
    ("POST", "/abort_request"): ApiOperation(
        "End a request, as SGLang", {200: {}}, obj({}, {"rid": STRING, "abort_all": BOOLEAN}), other=TEXT
    ),
    ("POST", "/concate_and_append_request"): ApiOperation(
        "Take the frontend language's hint to join branches",
        {200: obj({"success": BOOLEAN})},
        obj({"src_rids": array(STRING), "dst_rid": STRING}),
    ),
    ("GET", "/tree"): ApiOperation("The prompt tree: blocks, holders, truth", query={"digest": _SWITCH}),
    ("GET", "/tree/hottest"): ApiOperation(
        "The prefixes that most prompts had in common lately, and who holds them",
        {200: ref("Prefixes")},
        query={"n": {**INTEGER, "minimum": 1, "maximum": MAX_PREFIXES}},
    ),
    ("GET", "/requests"): ApiOperation(
        "Requests that ended lately, the last one first",
        {200: ref("Requests")},
        query={"n": {**INTEGER, "minimum": 1, "maximum": MAX_REQUESTS}, "faults": _SWITCH},
    ),
    ("GET", "/requests/{rid}"): ApiOperation(
        "One of them by rid or x-request-id, and why it went where it went", {200: ref("Explained")}
    ),
    ("GET", "/ui"): ApiOperation("The page that shows the cluster", other="text/html"),
    ("GET", "/ui/state"): ApiOperation("What it shows", {200: ref("State")}),
    ("GET", "/ui/{file}"): ApiOperation("What it needs", other="*/*"),
    ("GET", "/workers"): ApiOperation("Everyone the router knows of", {200: ref("Members")}),
    ("POST", "/workers"): ApiOperation(
        "Name a server: 201, or 200 if it was", {200: ref("Member"), 201: ref("Member")}, ref("Worker")
    ),
    ("GET", "/workers/{id}"): ApiOperation("One of them, by id or URL", {200: ref("Member")}),
    ("DELETE", "/workers/{id}"): ApiOperation(
        "Drain a named server, and forget it", {200: ref("Removed")}, query=_SECONDS
    ),
    ("POST", "/workers/{id}/drain"): ApiOperation(
        "Send it nothing new; answered when it has nothing left, or the time is over",
        {200: ref("Drained"), 202: ref("Drained")},
        ref("DrainRequest"),
        needs_body=False,
        query={"wait": _SWITCH},
    ),
    ("DELETE", "/workers/{id}/drain"): ApiOperation("Send it requests again", {200: ref("Member")}),
    ("POST", "/workers/{id}/role"): ApiOperation(
        "Make a prefill a decode, or back",
        {200: ref("RoleChange"), 202: ref("RoleChange")},
        ref("RoleRequest"),
        query={"wait": _SWITCH},
    ),
    ("GET", "/list_workers"): ApiOperation("The servers' URLs", {200: obj({"urls": array(STRING)})}),
    ("POST", "/add_worker"): ApiOperation(
        "Name a colocated server", {200: ref("Member"), 201: ref("Member")}, query=_URL, required=("url",)
    ),
    ("POST", "/remove_worker"): ApiOperation(
        "Drain a named server, and forget it",
        {200: ref("Removed")},
        query={**_URL, **_SECONDS},
        required=("url",),
    ),
}


def document() -> Schema:
    """The whole of it, by OpenAPI 3.1."""
    paths: Schema = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _described(method, path, operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "MemServe router",
            "version": __version__,
            "description": "One address for a cluster of SGLang servers: SGLang's and OpenAI's APIs, and "
            "pages about the cluster. Who needs which key: see `security`; without any configured, none is "
            "needed on the router's own machine.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas(),
            "securitySchemes": {
                "client": {"type": "http", "scheme": "bearer", "description": "--api-key, --api-keys-file"},
                "admin": {"type": "http", "scheme": "bearer", "description": "--admin-api-key-file"},
                "browser": {"type": "http", "scheme": "basic", "description": "the same key as the password"},
            },
        },
    }


async def page(_: web.Request) -> web.Response:
    """`GET /openapi.json`."""
    return json_response(encode_json(document()))


def _described(method: str, path: str, operation: ApiOperation) -> Schema:
    described: Schema = {
        "operationId": f"{method.lower()}{path.translate(_AS_NAME)}",
        "summary": operation.summary,
        "tags": [_tag(path)],
        "parameters": _parameters(path, operation),
        "responses": _responses(operation),
        "security": _security(path),
    }
    if operation.body is not None:
        content = {JSON: {"schema": operation.body}}
        described["requestBody"] = {"required": operation.needs_body, "content": content}
    return described


_AS_NAME = str.maketrans({"/": "_", "{": None, "}": None, ".": "_"})


def _tag(path: str) -> str:
    level = LEVELS.get(path, Permission.ADMIN)
    return {Permission.OPEN: "health", Permission.ADMIN: "management"}.get(level, "inference")


def _security(path: str) -> list[Schema]:
    level = LEVELS.get(path, Permission.ADMIN)
    if level is Permission.OPEN:
        return []
    admin: list[Schema] = [{"admin": []}, {"browser": []}]
    return admin if level is Permission.ADMIN else [{"client": []}, *admin]


def _parameters(path: str, operation: ApiOperation) -> list[Any]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    kinds = {"file": {"enum": list(PAGE_FILES)}}
    inside = [
        {"name": name, "in": "path", "required": True, "schema": kinds.get(name, {**STRING, "minLength": 1})}
        for name in names
    ]
    query = [
        {"name": name, "in": "query", "required": name in operation.required, "schema": schema}
        for name, schema in operation.query.items()
    ]
    return [*inside, *query]


def _responses(operation: ApiOperation) -> Schema:
    responses: Schema = {}
    for status, schema in operation.answers.items():
        content: Schema = {JSON: {"schema": schema}}
        if status == 200 and operation.other is not None:
            beside = content if operation.other == EVENTS else {}
            content = {**beside, operation.other: {"schema": STRING if operation.other != "*/*" else {}}}
        responses[str(status)] = {"description": "done", "headers": _HEADERS, "content": content}
        if operation.body is None or operation.other != EVENTS:
            del responses[str(status)]["headers"]
    error = {"content": {JSON: {"schema": ref("Error")}}}
    responses["4XX"] = {"description": "refused: the message names the field at fault", **error}
    responses["5XX"] = {"description": "the servers failed, or none is there: try again later", **error}
    return responses
