"""What HTTP asks of every endpoint and every error, on both kinds of connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memserve.router.http.endpoints import ENDPOINTS, PERMISSIONS, Permission
from memserve.router.http.plain_head import MAX_HEADERS
from memserve.testing.fake_worker import FakeWorker

from ..harness import Stage, pair, staged
from .test_server import BODY, STREAM

PAGE = "https://app.example"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
PATHS = {one.path: one.path.replace("{", "").replace("}", "") for one in ENDPOINTS}
"""A path that each endpoint's pattern matches."""
READABLE = [path for path in PATHS if PERMISSIONS.get(path) in (Permission.OPEN, Permission.CLIENT)]
MAX = 16 << 10
KINDS = ["", "Connection: keep-alive\r\n", "Connection: close\r\n"]
"""The first two stay on the router's own connections, aiohttp takes the third."""


def allowed(path: str) -> set[str]:
    found = {one.method for one in ENDPOINTS if one.path == path}
    return found | {"HEAD"} if "GET" in found else found


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    told = {"api_keys_file": "key-a alice\n", "admin_api_key_file": "root-key\n"}
    for name, text in told.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    return {name: tmp_path / name for name in told}


async def send(stage: Stage, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (latin-1) and body of the answer to these bytes; everything until the end."""
    port = int(stage.router.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await answer(reader)
    finally:
        writer.transport.abort()


async def answer(reader: Any) -> tuple[int, dict[str, str], bytes]:
    async with asyncio.timeout(10):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        if "content-length" in headers:
            body = await reader.readexactly(int(headers["content-length"]))
        else:
            body = (
                await reader.readuntil(b"0\r\n\r\n")
                if "transfer-encoding" in headers
                else await reader.read()
            )
        return int(first.split()[1]), headers, body


def post(extra: str = "", body: bytes = BODY, path: str = "/generate", version: str = "1.1") -> bytes:
    head = f"POST {path} HTTP/{version}\r\nHost: h\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    return head.encode("latin-1") + body


def is_enveloped(body: bytes) -> bool:
    return bool(json.loads(body)["error"]["message"])


# ---- methods


async def test_every_wrong_method_is_answered_405_with_the_right_ones() -> None:
    async with staged(FakeWorker()) as stage:
        for pattern, path in PATHS.items():
            for method in set(METHODS) - allowed(pattern) - {"HEAD"}:
                async with stage.client.request(method, stage.url(path), json={}) as response:
                    if response.status == 404 and pattern != path:
                        continue  # another pattern matches the example, and knows the method
                    assert response.status == 405, (method, path)
                    told = set(response.headers["Allow"].replace(" ", "").split(","))
                    assert allowed(pattern) <= told, (method, path)
                    assert method not in told
                    assert is_enveloped(await response.read())


async def test_head_is_answered_as_get_without_a_body() -> None:
    async with staged(*pair()) as stage:
        for one in ENDPOINTS:
            if one.method == "GET" and "{" not in one.path and not one.changes:
                async with stage.client.get(stage.url(one.path)) as response:
                    wanted = response.status
                async with stage.client.head(stage.url(one.path)) as response:
                    assert response.status == wanted, one.path
                    assert not await response.read()


# ---- keys


async def test_every_401_says_how_to_authenticate(keys: dict[str, Path]) -> None:
    async with staged(FakeWorker(), **keys) as stage:
        for one in ENDPOINTS:
            if one.permission is Permission.OPEN:
                continue
            async with stage.client.request(one.method, stage.url(PATHS[one.path]), data=b"{}") as response:
                assert response.status == 401, one.path
                told = response.headers.getall("WWW-Authenticate")
                assert "Bearer" in ", ".join(told), one.path
                assert is_enveloped(await response.read())


@pytest.mark.parametrize("kind", KINDS)
async def test_a_401_before_the_body_has_arrived_says_how_to_authenticate(kind: str) -> None:
    async with staged(FakeWorker(), api_key="secret", cors_allowed_origins=(PAGE,)) as stage:
        status, headers, body = await send(stage, post(f"Origin: {PAGE}\r\n{kind}", BODY)[: -len(BODY) // 2])
        assert (status, is_enveloped(body)) == (401, True)
        assert "Bearer" in headers["www-authenticate"]
        assert headers["access-control-allow-origin"] == PAGE


# ---- pages of other origins


def bad_requests(kind: str) -> Iterator[tuple[int, bytes]]:
    """One request per error, with its status."""
    origin = f"Origin: {PAGE}\r\n{kind}"
    yield 400, post(f"{origin}Authorization: Bearer secret\r\n", b"{")
    yield 401, post(origin.replace("Origin", "Authorization: Bearer wrong\r\nOrigin"))
    yield 404, post(f"{origin}Authorization: Bearer secret\r\n", path="/nope")
    yield 404, post(f"{origin}Authorization: Bearer secret\r\n", path="/v1/chat/completions/")
    yield 405, f"GET /generate HTTP/1.1\r\nHost: h\r\n{origin}\r\n".encode()
    yield 413, post(f"{origin}Authorization: Bearer secret\r\n", b"x" * 5000)
    yield 400, post(f"{origin}Content-Length: 3\r\n")
    yield 400, post(f"{origin}broken\r\n")
    yield 417, post(f"{origin}Expect: something\r\nAuthorization: Bearer secret\r\n")
    yield 431, post(f"{origin}X-Junk: {'a' * (MAX + 1)}\r\n")
    yield 431, post(origin + "".join(f"X-{i}: a\r\n" for i in range(MAX_HEADERS)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("origins", [(PAGE,), ("https://other.example", PAGE), ("*",)])
async def test_a_page_may_read_every_error(kind: str, origins: tuple[str, ...]) -> None:
    settings: Any = {"api_key": "secret", "cors_allowed_origins": origins, "max_body_bytes": 4000}
    async with staged(FakeWorker(), **settings) as stage:
        for wanted, data in bad_requests(kind):
            status, headers, body = await send(stage, data)
            assert (status, is_enveloped(body)) == (wanted, True), data[:200]
            assert headers["access-control-allow-origin"] in (PAGE, "*"), data[:200]
            assert headers["content-type"].startswith("application/json")


async def test_a_page_may_read_every_answer_of_a_client_endpoint() -> None:
    async with staged(*pair(), cors_allowed_origins=(PAGE,)) as stage:
        for one in ENDPOINTS:
            for method in (one.method, "PATCH"):
                path, headers = stage.url(PATHS[one.path]), {"Origin": PAGE}
                if one.path == "/flush_cache":
                    continue
                async with stage.client.request(method, path, json={}, headers=headers) as response:
                    is_readable = "Access-Control-Allow-Origin" in response.headers
                assert is_readable == (one.path in READABLE), one.path


async def test_preflight_requests_are_answered_for_client_endpoints_only() -> None:
    async with staged(cors_allowed_origins=(PAGE,), api_key="secret") as stage:
        for pattern, path in [*PATHS.items(), ("/nope", "/nope")]:
            for origin in (PAGE, "https://evil.example"):
                headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
                headers["Access-Control-Request-Headers"] = "authorization"
                async with stage.client.options(stage.url(path), headers=headers) as response:
                    allowed_origin = response.headers.get("Access-Control-Allow-Origin")
                    assert response.status < 500
                    if origin == PAGE and (pattern in READABLE or pattern == "/nope"):
                        assert (response.status, allowed_origin) == (204, PAGE), path
                        assert "POST" in response.headers["Access-Control-Allow-Methods"]
                        assert response.headers["Access-Control-Allow-Headers"] == "authorization"
                    else:
                        assert allowed_origin is None, path


# ---- heads


@pytest.mark.parametrize("size", [9_000, MAX - 200, MAX + 1, 200_000])
async def test_both_kinds_of_connections_have_one_limit_for_a_header(size: int) -> None:
    async with staged(FakeWorker()) as stage:
        for kind in KINDS:
            status, headers, body = await send(stage, post(f"X-Junk: {'a' * size}\r\n{kind}"))
            assert status == (431 if size > MAX else 200), (size, kind)
            assert headers["content-type"].startswith("application/json")
            assert size < MAX or is_enveloped(body)


async def test_the_limit_is_a_setting_and_holds_for_later_requests_and_request_lines() -> None:
    async with staged(FakeWorker(), max_header_bytes=2000) as stage:
        for kind in KINDS:
            assert (await send(stage, post(f"X-Junk: {'a' * 1900}\r\n{kind}")))[0] == 200
            assert (await send(stage, post(f"X-Junk: {'a' * 2001}\r\n{kind}")))[0] == 431
            assert (await send(stage, post(kind, path="/generate?" + "a" * 2001)))[0] == 431
        port = int(stage.router.url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for path in ("/generate", "/generate?x=1"):  # the second passes the connection to aiohttp
            writer.write(post(path=path))
            assert (await answer(reader))[0] == 200
        writer.write(post(f"X-Junk: {'a' * 2001}\r\n"))
        assert (await answer(reader))[0] == 431
        assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_many_headers_are_refused_as_one_large_header_is(kind: str) -> None:
    async with staged(FakeWorker()) as stage:
        for count, wanted in ((MAX_HEADERS - 4, 200), (MAX_HEADERS + 1, 431)):
            many = "".join(f"X-{i}: a\r\n" for i in range(count))
            status, _, body = await send(stage, post(many + kind))
            assert status == wanted
            assert wanted == 200 or is_enveloped(body)


# ---- versions and targets


@pytest.mark.parametrize("extra", ["", "Connection: keep-alive\r\n"])
@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_an_answer_to_http_1_0_is_not_chunked_and_ends(extra: str, body: bytes) -> None:
    async with staged(FakeWorker()) as stage:
        status, headers, got = await send(stage, post(extra, body, version="1.0"))
        assert status == 200
        assert "transfer-encoding" not in headers
        assert got.endswith(b"data: [DONE]\n\n") if body is STREAM else json.loads(got)["text"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "target", ["http://h/generate", "http://h:1/generate?x=1", "/generate?api-version=1"]
)
async def test_absolute_targets_and_queries_are_served(target: str, kind: str) -> None:
    async with staged(FakeWorker()) as stage:
        status, _, body = await send(stage, post(kind, path=target))
        assert (status, bool(json.loads(body)["text"])) == (200, True)


@pytest.mark.parametrize(
    "target", ["/\xff", "/v1/models/\xff", "/v1/models/%ff", "/workers/\xff", "*", "/%00"]
)
async def test_odd_bytes_in_a_target_are_a_clients_error(target: str) -> None:
    async with staged(FakeWorker()) as stage:
        for method in ("GET", "OPTIONS", "POST"):
            head = f"{method} {target} HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
            status, _, body = await send(stage, head.encode("latin-1"))
            assert (status // 100, is_enveloped(body)) == (4, True), (method, target)


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        ("Transfer-Encoding: chunked", b"3\r\n{}}XX0\r\n\r\n"),
        ("Content-Encoding: gzip\r\nContent-Length: 12", b"not gzipped!"),
    ],
)
async def test_a_broken_body_is_a_clients_error_at_every_endpoint(fields: str, body: bytes) -> None:
    async with staged(FakeWorker()) as stage:
        for one in ENDPOINTS:
            if one.method == "POST" and one.body is not None:
                head = f"POST {PATHS[one.path]} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n\r\n"
                status, _, told = await send(stage, head.encode() + body)
                assert (status, is_enveloped(told)) == (400, True), one.path


# ---- request ids


IDS = ["plain", "caf\xe9", "\xff\xfe", "caf\xc3\xa9", "a\tb", "\xc2\x9b31m", "\xed\xa0\x80"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sent", IDS)
async def test_a_request_id_of_any_bytes_comes_back_as_sent(
    sent: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with staged(FakeWorker()) as stage:
        for body, wanted in ((BODY, 200), (STREAM, 200), (b"{", 400)):
            status, headers, _ = await send(stage, post(f"x-request-id: {sent}\r\n{kind}", body))
            assert (status, headers["x-request-id"]) == (wanted, sent)
        # The dashboard and the logs have it as text.
        told = (await stage.get("/requests"))[1]["requests"]
        assert len(told) == 3
        for line in [*(one["request_id"] for one in told), *(one.getMessage() for one in caplog.records)]:
            line.encode()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_key_that_is_not_ascii_is_the_same_on_both_kinds_of_connections(
    kind: str, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("schlüssel alice\n")
    (tmp_path / "keys").chmod(0o600)
    async with staged(FakeWorker(), api_keys_file=tmp_path / "keys") as stage:
        for key, wanted in (("schlüssel", 200), ("schl\xfcssel\xff", 401)):
            sent = key.encode() if wanted == 200 else key.encode("latin-1")
            extra = f"Authorization: Bearer {sent.decode('latin-1')}\r\n{kind}"
            assert (await send(stage, post(extra)))[0] == wanted


@pytest.mark.parametrize("kind", KINDS)
async def test_a_clients_authorization_of_any_bytes_reaches_the_server(kind: str) -> None:
    async with staged(FakeWorker()) as stage:
        assert (await send(stage, post(f"Authorization: Bearer \xff\r\n{kind}")))[0] == 200
        (got,) = stage.colocated.requests
        assert got.headers["Authorization"].encode(errors="surrogateescape") == b"Bearer \xff"
        got = await send(
            stage, post(f"Authorization: Bearer \xff\r\n{kind}", b'{"input": "a"}', "/v1/embeddings")
        )
        assert got[0] == 200
