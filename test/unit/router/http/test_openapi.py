"""The OpenAPI document lists the routed endpoints, and answers match its schemas."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web
from jsonschema import Draft202012Validator

from memserve.router.http.endpoints import ENDPOINTS
from memserve.router.http.openapi import document
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import Stage, pair, staged

IDS = list(range(64))
OPERATIONS = {(one.method, one.path) for one in ENDPOINTS}


def is_valid(schema: Any, value: Any) -> None:
    """Raises a readable error if `value` does not match the schema."""
    whole = {**schema, "components": document()["components"]}
    Draft202012Validator(whole).validate(value)


async def test_openapi_document_and_routes_have_the_same_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    apps: list[web.Application] = []
    add_routes = web.Application.add_routes

    def watched(app: web.Application, routes: Any) -> Any:
        apps.append(app)
        return add_routes(app, routes)

    monkeypatch.setattr(web.Application, "add_routes", watched)
    async with staged(*pair()):
        routed = {
            (route.method, route.resource.canonical)
            for route in apps[-1].router.routes()
            if route.resource is not None and route.method != "HEAD"
        }
    assert routed == OPERATIONS


def test_openapi_schemas_are_valid_and_references_resolve() -> None:
    told = document()
    for schema in told["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    names = set(told["components"]["schemas"])
    text = str(told)
    assert {part.split("'")[0] for part in text.split("#/components/schemas/")[1:]} <= names
    identifiers = [one["operationId"] for path in told["paths"].values() for one in path.values()]
    assert len(set(identifiers)) == len(identifiers)


def test_openapi_security_follows_the_permissions() -> None:
    paths = document()["paths"]
    assert paths["/health"]["get"]["security"] == []
    assert {"client": []} in paths["/generate"]["post"]["security"]
    assert {"client": []} not in paths["/workers"]["get"]["security"]


async def answers(stage: Stage, method: str, path: str, **kwargs: Any) -> None:
    """Send a request, and check the answer against the document."""
    async with stage.client.request(method, stage.url(path), **kwargs) as response:
        kind, status = response.content_type, response.status
        told = await response.json() if kind == "application/json" else await response.text()
    paths = document()["paths"]
    path = path.partition("?")[0]
    template = path if path in paths else next(one for one in paths if matches(one, path))
    described = paths[template][method.lower()]["responses"]
    answer = described.get(str(status)) or described[f"{status // 100}XX"]
    content = answer["content"]
    assert kind in content or "*/*" in content, (path, status, kind)
    if kind == "application/json" and kind in content:
        is_valid(content[kind]["schema"], told)


def matches(template: str, path: str) -> bool:
    ours, theirs = template.split("/"), path.split("/")
    return len(ours) == len(theirs) and all(
        a == b or a.startswith("{") for a, b in zip(ours, theirs, strict=True)
    )


async def test_answers_match_the_openapi_schemas() -> None:
    worker = FakeWorker(Role.COLOCATED, cache_tokens=1 << 16)
    async with staged(worker) as stage:
        await stage.until(stage.router.state.subscriptions.stats)
        for last in range(3):
            body = {"input_ids": [*IDS, *[last] * 16], "rid": f"r{last}"}
            await answers(stage, "POST", "/generate", json=body)
            await answers(stage, "PUT", "/generate", json={**body, "stream": True})
        await answers(stage, "POST", "/generate", json={"text": ["a", "b"]})
        await answers(stage, "POST", "/v1/chat/completions", json={"messages": [{"role": "user"}]})
        await answers(stage, "POST", "/v1/completions", json={"prompt": "x"})
        await answers(stage, "POST", "/v1/embeddings", json={"input": "x"})
        await answers(stage, "POST", "/explain", json={"prompt": "x"})
        await answers(stage, "POST", "/workers", json={"url": "http://127.0.0.1:9"})
        await answers(stage, "POST", "/add_worker?url=http://127.0.0.1:8")
        await answers(stage, "POST", "/remove_worker?url=http://127.0.0.1:8&timeout_s=0")
        name = f"colocated-{worker.port}"
        for path in OPERATIONS:
            if path[0] == "GET" and "{" not in path[1]:
                await answers(stage, "GET", path[1])
        for path in ("/requests/r1", f"/workers/{name}", "/v1/models/fake-model", "/ui/app.js"):
            await answers(stage, "GET", path)
        await answers(stage, "POST", f"/workers/{name}/role?wait=0", json={"role": "prefill"})
        await answers(stage, "POST", f"/workers/{name}/drain?wait=0")
        await answers(stage, "DELETE", f"/workers/{name}/drain")
        await answers(stage, "DELETE", f"/workers/{name}")
        await answers(stage, "POST", "/abort_request", json={"rid": "x"})
        await answers(stage, "POST", "/flush_cache")
        for path in ("/requests/none", "/workers/none", "/v1/models/none", "/ui/none", "/requests?n=0"):
            await answers(stage, "GET", path)
        await answers(stage, "POST", "/generate", json={"text": 5})


async def test_answers_without_servers_match_the_openapi_schemas() -> None:
    async with staged() as stage:
        for method, path in OPERATIONS:
            if method == "GET" and "{" not in path:
                await answers(stage, "GET", path)
        await answers(stage, "POST", "/generate", json={"text": "x"})
