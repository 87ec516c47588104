"""Pages of an SGLang server that probes and load balancers ask for."""

from __future__ import annotations

import pytest

from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import pair, staged


async def test_pages_of_a_server_are_answered_for_the_cluster() -> None:
    async with staged(*pair()) as stage:
        for path in ("/health_generate", "/ready", "/ping"):
            async with stage.client.get(stage.url(path)) as response:
                assert (response.status, await response.read()) == (200, b"")
        assert (await stage.get("/version"))[1]["version"]
        _, page = await stage.get("/v1/loads?include=core")
        ids = {f"{role}-{workers[0].port}" for role, workers in stage.workers.items()}
        assert {(one["instance_id"], one["num_used_tokens"]) for one in page["loads"]} == {
            (one, 3) for one in ids
        }
        _, loads = await stage.get("/get_load")
        assert {(one["instance_id"], one["num_reqs"], one["num_tokens"]) for one in loads} == {
            (one, 3, 3) for one in ids
        }
        status, answer = await stage.get("/v1/loads?format=prometheus")
        assert (status, answer["error"]["param"]) == (400, "format")


async def test_an_instance_that_does_not_answer_has_no_load() -> None:
    async with staged(FakeWorker(Role.PREFILL), FakeWorker(Role.DECODE)) as stage:
        await stage.prefill.kill()
        _, page = await stage.get("/v1/loads")
        assert [one["instance_id"] for one in page["loads"]] == [f"decode-{stage.decode.port}"]
        await stage.decode.kill()
        assert (await stage.get("/v1/loads"))[0] == 503


async def test_probes_fail_while_no_request_can_be_served() -> None:
    async with staged(FakeWorker(Role.PREFILL)) as stage:
        for path in ("/health_generate", "/ready", "/ping"):
            status, answer = await stage.get(path)
            assert (status, answer["error"]["message"]) == (503, "no decode server is ready")


@pytest.mark.parametrize(
    "path", ["/invocations", "/vertex_generate", "/v1/responses", "/v1/messages", "/v1/score", "/tokenize"]
)
async def test_a_page_that_no_pair_serves_is_answered_404_in_the_envelope(path: str) -> None:
    async with staged(*pair()) as stage:
        status, answer = await stage.post(path, {"messages": []})
        assert (status, answer["error"]["type"]) == (404, "not_found_error")
