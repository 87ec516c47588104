"""The HTTP API: answers to requests that cannot be dispatched, and the info endpoints."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from memserve.router.app import running_router
from memserve.router.config import RouterConfig
from memserve.router.kv_events.subscribers import StockSubscriptions
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import Stage, info_of, pair, staged

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'{"text": 5, "prompt": 5}', b'{"prompt": [-1]}'])
async def test_invalid_requests_are_not_sent_to_a_server(path: str, raw: bytes) -> None:
    async with staged(*pair()) as stage:
        async with stage.client.post(stage.url(path), data=raw) as response:
            answer = await response.json()
        assert response.status == 400
        assert answer["error"]["message"]
        assert answer["error"]["type"] == "invalid_request_error"
        assert not stage.prefill.requests
        assert not stage.decode.requests


async def test_token_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 256}))
    workers = [FakeWorker(role, model_path=str(tmp_path)) for role in (Role.PREFILL, Role.DECODE)]
    async with staged(*workers) as stage:
        status, answer = await stage.post("/generate", {"input_ids": [[1, 2], [3, 256]]})
        assert (status, answer["error"]["param"]) == (400, "input_ids[1][1]")
        status, answer = await stage.post("/v1/completions", {"prompt": [256]})
        assert (status, answer["error"]["param"]) == (400, "prompt[0]")
        status, answer = await stage.post("/generate", {"input_ids": [1] * 1024})
        assert (status, answer["error"]["param"]) == (400, "input_ids")
        assert (await stage.get("/readiness"))[1]["token_ids_not_checked"] == []
        assert not stage.prefill.requests
        assert (await stage.post("/generate", {"input_ids": [255]}))[0] == 200


@pytest.mark.parametrize(("num_special_tokens", "status"), [(0, 400), (1, 200)])
async def test_empty_text_is_refused_if_the_tokenizer_makes_no_token_of_it(
    num_special_tokens: int, status: int
) -> None:
    workers = [
        FakeWorker(role, num_special_tokens=num_special_tokens) for role in (Role.PREFILL, Role.DECODE)
    ]
    async with staged(*workers) as stage:
        assert (await stage.post("/generate", {"text": ""}))[0] == status
        assert len(stage.decode.requests) == (status == 200)


async def test_a_body_above_max_body_bytes_is_answered_413() -> None:
    async with staged(*pair(), max_body_bytes=1000) as stage:
        status, answer = await stage.post("/generate", {"text": "x" * 2000})
        assert (status, answer["error"]["type"]) == (413, "request_too_large")

        async def endless() -> Any:
            for _ in range(2000):
                yield b"x" * 100

        async with stage.client.post(stage.url("/generate"), data=endless()) as response:
            assert response.status == 413
        assert not stage.decode.requests


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_an_unknown_model_is_answered_404(path: str) -> None:
    async with staged(*pair()) as stage:
        status, answer = await stage.post(path, {**CHAT, "prompt": "a", "model": "other"})
        assert (status, answer["error"]["param"]) == (404, "model")
        assert "fake-model" in answer["error"]["message"]
        for model in ("fake-model", "default", None):
            assert (await stage.post(path, {**CHAT, "prompt": "a", "model": model}))[0] == 200


@pytest.mark.parametrize(
    ("role", "reason"),
    [
        (None, "no server is ready"),
        (Role.PREFILL, "no decode server is ready"),
        (Role.DECODE, "no prefill server is ready"),
    ],
)
async def test_a_request_without_a_ready_pair_is_answered_503_with_the_reason(
    role: Role | None, reason: str
) -> None:
    async with staged(*([FakeWorker(role)] if role else [])) as stage:
        status, answer = await stage.post("/generate", {"text": "hello"})
        assert (status, answer["error"]["message"]) == (503, reason)
        assert answer["error"]["retryable"] is True
        status, answer = await stage.get("/readiness")
        assert (status, answer["ready"], answer["reason"]) == (503, False, reason)
        for path in ("/health", "/liveness"):
            async with stage.client.get(stage.url(path)) as response:
                assert response.status == 200


async def test_invalid_requests_are_answered_400_even_without_servers() -> None:
    async with staged() as stage:
        assert (await stage.post("/generate", {"text": 5}))[0] == 400
        assert (await stage.post("/flush_cache", None))[0] == 503
        assert (await stage.get("/model_info"))[0] == 503
        assert (await stage.get("/v1/models"))[1]["data"] == []


async def test_the_answer_has_the_clients_request_id_or_a_new_one() -> None:
    async with staged(*pair()) as stage:
        for body, status in (({"text": "a"}, 200), ({"text": "a", "stream": True}, 200), ({}, 400)):
            for sent in ("mine", None):
                headers = {"x-request-id": sent} if sent else {}
                async with stage.client.post(stage.url("/generate"), json=body, headers=headers) as response:
                    assert response.status == status
                    got = response.headers["x-request-id"]
                    assert got == sent if sent else len(got) == 32


async def test_flush_cache_marks_flushed_instances_as_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(StockSubscriptions, "record_flush", lambda _, name: flushed.append(name))

    async with staged(*pair()) as stage:
        async with stage.client.post(stage.url("/flush_cache")) as response:
            assert response.status == 200
        assert len(set(flushed)) == len(flushed) == 2


async def test_info_endpoints_answer_for_the_servers() -> None:
    async with staged(*pair()) as stage:
        for path in ("/model_info", "/get_model_info"):
            assert (await stage.get(path))[1]["model_path"] == "/nowhere/fake-model"
        for path in ("/server_info", "/get_server_info"):
            status, info = await stage.get(path)
            assert (status, info["page_size"], info["disaggregation_mode"]) == (200, 16, "null")
            assert [one["role"] for one in info["workers"]] == ["decode", "prefill"]
        _, models = await stage.get("/v1/models")
        assert [(card["id"], card["max_model_len"]) for card in models["data"]] == [("fake-model", 1024)]
        assert (await stage.get("/v1/models/fake-model"))[1]["id"] == "fake-model"
        assert (await stage.get("/v1/models/other"))[0] == 404
        _, workers = await stage.get("/workers")
        assert [one["state"] for one in workers["workers"]] == ["ready", "ready"]
        for method in (stage.client.get, stage.client.post):
            async with method(stage.url("/flush_cache")) as response:
                assert response.status == 200
        assert (stage.prefill.num_flushes, stage.decode.num_flushes) == (2, 2)
        await stage.client.post(stage.url("/abort_request"), json={"rid": "", "abort_all": True})
        assert stage.prefill.aborts == stage.decode.aborts == [""]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/concate_and_append_request", 400),
        ("GET", "/nowhere", 404),
        ("GET", "/generate", 405),
    ],
)
async def test_unknown_paths_are_answered_404_as_json(method: str, path: str, status: int) -> None:
    async with staged() as stage, stage.client.request(method, stage.url(path), json={}) as response:
        assert response.status == status
        assert (await response.json())["error"]["message"]


async def test_the_clients_authorization_is_sent_to_the_server() -> None:
    async with staged(*pair()) as stage:
        await stage.post("/generate", {"text": "a"}, headers={"Authorization": "Bearer k"})
        for worker in (stage.prefill, stage.decode):
            assert worker.requests[0].headers["Authorization"] == "Bearer k"


async def test_a_leaving_client_aborts_its_request_on_a_colocated_server() -> None:
    async with staged(FakeWorker(Role.COLOCATED)) as stage:
        stage.colocated.script = Script(gates={1: asyncio.Event()})
        async with stage.client.post(stage.url("/generate"), json={"text": "a", "stream": True}) as response:
            assert b"Hello" in await response.content.readany()
            response.close()
        await stage.colocated.until(lambda w: w.requests[0].dropped and w.aborts)


async def test_a_stopping_router_answers_running_requests_503() -> None:
    async with FakeWorker(Role.COLOCATED) as worker, aiohttp.ClientSession() as client:
        worker.script = Script(gates={1: asyncio.Event()})
        config = RouterConfig.of(port=0, shutdown_grace_period_secs=0.05)
        async with running_router(config) as router:
            stage = Stage(router, client)
            router.cluster.register(info_of(worker))
            await stage.until(stage.is_ready)
            stream = asyncio.create_task(stage.events("/generate", {"text": "a", "stream": True}))
            await worker.until(lambda w: w.requests and w.requests[0].num_sent)
            whole = asyncio.create_task(stage.post("/generate", {"text": "a"}))
            await worker.until(lambda w: len(w.requests) == 2)
        assert b"retryable" in (await stream)[-1]
        status, answer = await whole
        assert (status, answer["error"]["retryable"]) == (503, True)
        await worker.until(lambda w: all(one.dropped for one in w.requests))
