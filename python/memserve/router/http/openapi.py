"""The table of endpoints as an OpenAPI document."""

from __future__ import annotations

from functools import cache
from typing import Any

from memserve import __version__
from memserve.router.field_kinds import Schema
from memserve.router.http.endpoints import ANY, ENDPOINTS, EVENTS, FILES, HttpEndpoint, Permission
from memserve.router.http.schemas import STRING, ErrorAnswer, components, schema_of
from memserve.router.request import encode_json

JSON = "application/json"
_HEADERS = {"x-request-id": {"schema": STRING, "description": "the request's own, or a new one"}}
_ERROR = {"content": {JSON: {"schema": schema_of(ErrorAnswer)}}}
_TAGS = {Permission.OPEN: "health", Permission.ADMIN: "management"}
_AS_NAME = str.maketrans({"/": "_", "{": None, "}": None, ".": "_"})


_EVENT: Schema = {"type": "object", "properties": {"data": STRING}}
"""One event of a stream."""
_MEDIA_SCHEMAS: dict[str, Schema] = {ANY: {}, EVENTS: _EVENT}


@cache
def encoded_document() -> bytes:
    """The document as JSON, made when it is first asked for."""
    return encode_json(document())


def document() -> Schema:
    """The whole document, by OpenAPI 3.1."""
    paths: Schema = {}
    for one in ENDPOINTS:
        paths.setdefault(one.path, {})[one.method.lower()] = _operation(one)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "MemServe router",
            "version": __version__,
            "description": "One address for a cluster of SGLang servers: SGLang's and OpenAI's APIs, and "
            "endpoints about the cluster. `security` says which key an endpoint needs; if no keys are "
            "configured, requests from the router's own machine need none.",
        },
        "paths": paths,
        "components": {
            "schemas": components([kind for one in ENDPOINTS for kind in (one.answer, one.body) if kind]),
            "securitySchemes": {
                "client": {"type": "http", "scheme": "bearer", "description": "--api-key, --api-keys-file"},
                "admin": {"type": "http", "scheme": "bearer", "description": "--admin-api-key-file"},
                "browser": {"type": "http", "scheme": "basic", "description": "the same key as the password"},
            },
        },
    }


def _operation(one: HttpEndpoint) -> Schema:
    operation: Schema = {
        "operationId": f"{one.method.lower()}{one.path.translate(_AS_NAME)}",
        "summary": one.summary,
        "tags": [_TAGS.get(one.permission, "inference")],
        "parameters": _parameters(one),
        "responses": _responses(one),
        "security": _security(one.permission),
    }
    if one.body is not None:
        content = {JSON: {"schema": schema_of(one.body)}}
        operation["requestBody"] = {"required": one.needs_body, "content": content}
    return operation


def _security(permission: Permission) -> list[Schema]:
    if permission is Permission.OPEN:
        return []
    admin: list[Schema] = [{"admin": []}, {"browser": []}]
    return admin if permission is Permission.ADMIN else [{"client": []}, *admin]


def _parameters(one: HttpEndpoint) -> list[Any]:
    names = [part[1:-1] for part in one.path.split("/") if part.startswith("{")]
    text = {**STRING, "minLength": 1}
    inside = [
        {"name": name, "in": "path", "required": True, "schema": FILES if name == "file" else text}
        for name in names
    ]
    query = [
        {"name": name, "in": "query", "required": name in one.required, "schema": schema}
        for name, schema in one.query.items()
    ]
    return [*inside, *query]


def _responses(one: HttpEndpoint) -> Schema:
    responses: Schema = {}
    for status in one.statuses:
        content: Schema = {JSON: {"schema": schema_of(one.answer)}}
        if status == 200 and one.media is not None:
            beside = content if one.media == EVENTS else {}
            content = {**beside, one.media: {"schema": _MEDIA_SCHEMAS.get(one.media, STRING)}}
        headers = {"headers": _HEADERS} if one.media == EVENTS else {}
        responses[str(status)] = {"description": "success", **headers, "content": content}
    return {
        **responses,
        "4XX": {"description": "refused: the message names the field at fault", **_ERROR},
        "5XX": {"description": "a server failed or none is ready: try again later", **_ERROR},
    }
