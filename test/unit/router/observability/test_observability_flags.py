"""Observability flags as a client or browser sees them: request ids, origins, an extra metrics port."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from ..harness import pair, staged

PAGE = "https://page.example"


def sent(**settings: Any) -> Any:
    return staged(*pair(), **settings)


@pytest.mark.parametrize("plain", [True, False])
async def test_router_keeps_the_request_id_of_a_header(plain: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "memserve.router.http.request_chain")
    web = {} if plain else {"upgrade": "nothing"}
    async with sent(request_id_headers=("x-trace", "X-Call")) as stage:
        for headers, expected in (
            ({"x-call": "one"}, "one"),
            ({"x-call": "one", "x-trace": "two"}, "two"),
            ({"x-call": "l" * 1000}, "l" * 256),
            ({"x-request-id": "not asked for"}, None),
        ):
            request = stage.client.post(stage.url("/generate"), json={"text": "hello"}, headers=headers | web)
            async with request as response:
                given = response.headers["x-request-id"]
            assert given == expected or (expected is None and given != "not asked for")
            assert f"request_id={given} " in caplog.text


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("stream", [True, False])
async def test_cors_allows_the_configured_origins(plain: bool, stream: bool) -> None:
    web = {} if plain else {"upgrade": "nothing"}
    async with sent(cors_allowed_origins=(PAGE,)) as stage:
        for origin, allowed in ((PAGE, PAGE), ("https://other.example", None)):
            body, headers = {"text": "x", "stream": stream}, {"Origin": origin} | web
            request = stage.client.post(stage.url("/generate"), json=body, headers=headers)
            async with request as response:
                assert response.headers.get("Access-Control-Allow-Origin") == allowed
            async with stage.client.get(stage.url("/v1/models"), headers={"Origin": origin}) as response:
                assert response.headers.get("Access-Control-Allow-Origin") == allowed


async def test_cors_answers_preflight_requests() -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with sent(cors_allowed_origins=("*",)) as stage:
        for path, status in (("/v1/chat/completions", 204), ("/v1/models/x", 204), ("/workers", 405)):
            request = stage.client.options(stage.url(path), headers={"Origin": PAGE} | asks)
            async with request as response:
                assert response.status == status, path
                allowed = response.headers.get("Access-Control-Allow-Origin")
                assert allowed == ("*" if status == 204 else None)


async def test_cors_is_off_by_default() -> None:
    async with staged(*pair()) as stage:
        request = stage.client.post(stage.url("/generate"), json={"text": "x"}, headers={"Origin": PAGE})
        async with request as response:
            assert not any(name.lower().startswith("access-control") for name in response.headers)


async def test_metrics_are_served_on_an_extra_port(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "memserve.router.http.routes")
    async with sent(prometheus_port=0, prometheus_duration_buckets=(0.5, 1.0)) as stage:
        await stage.post("/generate", {"text": "hello"})
        line = next(one for one in caplog.messages if one.startswith("metrics ready"))
        url = line.partition("http=")[2]
        async with stage.client.get(url) as response:
            told = await response.text()
        assert 'request_seconds_bucket{le="0.5",path="/generate"} 1.0' in told
        assert 'le="0.001",path' not in told
        async with stage.client.get(url.replace("/metrics", "/workers")) as response:
            assert response.status == 404
