"""Endpoints that are passed on: one colocated server answers, as the client would be answered by it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import pair, staged

BODY = {"input": ["a", "b"], "encoding_format": "float"}


def secret(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


async def test_passthrough_hands_on_the_body_and_the_answer_unchanged() -> None:
    async with staged(FakeWorker()) as stage:
        status, answer = await stage.post("/v1/embeddings", BODY, headers={"Authorization": "Bearer mine"})
        assert (status, answer["data"][0]["embedding"]) == (200, [0.5, -0.5])
        (received,) = stage.colocated.requests
        assert (received.path, received.body) == ("/v1/embeddings", BODY)
        assert received.headers["Authorization"] == "Bearer mine"


async def test_passthrough_sends_a_request_to_the_least_loaded_colocated_server() -> None:
    gate = asyncio.Event()
    workers = [FakeWorker(script=Script(gates={0: gate})) for _ in range(3)]
    async with staged(*workers, *pair()) as stage:
        asked = [asyncio.create_task(stage.post("/v1/embeddings", BODY)) for _ in range(3)]
        for worker in workers:
            await worker.until(lambda it: len(it.requests) == 1)
        gate.set()
        assert [(await one)[0] for one in asked] == [200] * 3
        assert not stage.prefill.requests
        assert not stage.decode.requests


async def test_passthrough_to_pairs_alone_is_told_what_is_missing() -> None:
    async with staged(*pair()) as stage:
        status, answer = await stage.post("/v1/embeddings", BODY)
        assert (status, answer["error"]["retryable"]) == (404, False)
        assert "colocated" in answer["error"]["message"]


async def test_passthrough_tries_the_next_server_if_the_first_cannot_be_reached() -> None:
    workers = [FakeWorker(), FakeWorker()]
    async with staged(*workers) as stage:
        await workers[0].kill()
        for _ in range(3):
            assert (await stage.post("/v1/embeddings", BODY))[0] == 200
        assert len(workers[1].requests) == 3


async def test_passthrough_sends_a_received_request_to_no_other_server() -> None:
    workers = [FakeWorker(script=Script(drop_before=0)) for _ in range(2)]
    async with staged(*workers) as stage:
        status, answer = await stage.post("/v1/embeddings", BODY)
        assert (status, answer["error"]["retryable"]) == (503, True)
        assert sum(len(worker.requests) for worker in workers) == 1


async def test_passthrough_answers_errors_in_the_envelope_of_all_others() -> None:
    async with staged(FakeWorker()) as stage:
        for status in (400, 500):
            stage.colocated.script = Script(status=status, message="out of luck")
            got, answer = await stage.post("/v1/embeddings", BODY)
            assert got == {400: 400, 500: 502}[status]
            assert "out of luck" in answer["error"]["message"]
        stage.colocated.script = Script()
        assert (await stage.post("/v1/embeddings", {**BODY, "model": "other"}))[0] == 404
        assert (await stage.post("/v1/embeddings", ["no object"]))[0] == 400


async def test_passthrough_needs_a_key_and_a_slot_and_is_logged(tmp_path: Path) -> None:
    keys = secret(tmp_path / "keys", "key-a alice tps=1\n")
    key = {"Authorization": "Bearer key-a"}
    async with staged(FakeWorker(), api_keys_file=keys) as stage:
        assert (await stage.post("/v1/embeddings", BODY))[0] == 401
        assert (await stage.post("/v1/embeddings", BODY, headers=key))[0] == 200
        assert (await stage.post("/v1/embeddings", BODY, headers=key))[0] == 429
        assert "Authorization" not in stage.colocated.requests[0].headers
        refused, served = stage.router.state.telemetry.requests.newest(3)
        assert {refused.path, served.path} == {"/v1/embeddings"}
        assert (refused.status, served.status) == (429, 200)
        assert str(served.route) == f"colocated-{stage.colocated.port}"


async def test_passthrough_closes_the_servers_connection_when_the_client_leaves() -> None:
    worker = FakeWorker(Role.COLOCATED, Script(gates={0: asyncio.Event()}))
    async with staged(worker) as stage:
        asked = asyncio.create_task(stage.post("/v1/embeddings", BODY))
        await worker.until(lambda it: it.requests)
        asked.cancel()
        await worker.until(lambda it: it.requests[0].dropped)


async def test_passthrough_ends_a_request_that_takes_too_long() -> None:
    worker = FakeWorker(script=Script(gates={0: asyncio.Event()}))
    async with staged(worker, request_timeout_secs=0.2) as stage:
        status, answer = await stage.post("/v1/embeddings", BODY)
        assert (status, "0.2 s" in answer["error"]["message"]) == (504, True)
        await worker.until(lambda it: it.requests[0].dropped)
