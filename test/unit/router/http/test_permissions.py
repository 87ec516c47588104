"""Every endpoint accepts only the keys of its permission."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import yarl

from memserve.router.config import RouterConfig
from memserve.router.http.endpoints import PERMISSIONS, Permission
from memserve.router.http.ingress import build_ingress
from memserve.router.http.middleware import Guard
from memserve.router.observability.metrics import RouterMetrics
from memserve.testing.fake_worker import FakeWorker

from ..harness import Stage, staged

OPEN = ["/health", "/liveness", "/readiness", "/metrics"]
CLIENTS = ["/v1/models", "/v1/models/fake-model", "/model_info", "/get_model_info", "/server_info"]
ADMINS = ["/workers", "/list_workers", "/tree", "/flush_cache"]
CHANGES = [
    ("POST", "/workers"),
    ("POST", "/workers/x/drain"),
    ("DELETE", "/workers/x/drain"),
    ("DELETE", "/workers/x"),
    ("POST", "/add_worker?url=http://127.0.0.1:1"),
    ("POST", "/remove_worker?url=http://127.0.0.1:1"),
    ("POST", "/flush_cache"),
]
GENERATES = [
    *("/generate", "/v1/completions", "/v1/chat/completions", "/v1/embeddings"),
    *("/explain", "/abort_request"),
]


def secret(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    return {
        "api_keys_file": secret(tmp_path / "tenants", "key-a alice\n"),
        "admin_api_key_file": secret(tmp_path / "admins", "root-key\n"),
    }


async def status(stage: Stage, method: str, path: str, **headers: str) -> int:
    url = yarl.URL(stage.url(path), encoded=True)
    async with stage.client.request(method, url, headers=headers, data=b"{}") as response:
        text = await response.text()
        assert "root-key" not in text
        assert "key-a" not in text
        return response.status


async def test_without_keys_on_loopback_every_endpoint_is_open() -> None:
    async with staged(FakeWorker()) as stage:
        for path in OPEN + CLIENTS + ADMINS:
            assert await status(stage, "GET", path) == 200, path
        for method, path in CHANGES:
            assert await status(stage, method, path) not in (401, 403), path


async def test_with_tenants_and_no_admin_keys_admin_endpoints_are_refused(keys: dict[str, Path]) -> None:
    async with staged(FakeWorker(), api_keys_file=keys["api_keys_file"]) as stage:
        for headers in ({}, {"Authorization": "Bearer key-a"}, {"Authorization": "Bearer root-key"}):
            for path in ADMINS:
                assert await status(stage, "GET", path, **headers) == 403, path
            for method, path in CHANGES:
                assert await status(stage, method, path, **headers) == 403, path
        assert stage.colocated.num_flushes == 0
        _, told = await stage.post("/flush_cache", {})
        assert "--admin-api-key-file" in told["error"]["message"]


async def test_each_endpoint_accepts_only_keys_of_its_permission(keys: dict[str, Path]) -> None:
    async with staged(FakeWorker(), **keys) as stage:
        no_key: dict[str, str] = {}
        wrong = {"Authorization": "Bearer key-b"}
        client = {"Authorization": "Bearer key-a"}
        admin = {"Authorization": "Bearer root-key"}
        for path in OPEN:
            assert await status(stage, "GET", path) == 200, path
        for path in CLIENTS:
            got = [await status(stage, "GET", path, **headers) for headers in (no_key, wrong, client, admin)]
            assert got == [401, 401, 200, 200], path
        for path in ADMINS:
            got = [await status(stage, "GET", path, **headers) for headers in (no_key, wrong, client, admin)]
            assert got == [401, 401, 401, 200], path
        for method, path in CHANGES:
            for headers in (no_key, wrong, client):
                assert await status(stage, method, path, **headers) == 401, path
            assert await status(stage, method, path, **admin) not in (401, 403), path
        for path in GENERATES:
            for headers in (no_key, wrong):
                assert await status(stage, "POST", path, **headers) == 401, path
        assert not stage.colocated.requests


async def test_the_single_api_key_opens_every_endpoint() -> None:
    worker = FakeWorker()
    async with staged(worker, api_key="the-key") as stage:
        for path in CLIENTS + ADMINS:
            assert await status(stage, "GET", path) == 401, path
            assert await status(stage, "GET", path, Authorization="Bearer the-key") == 200, path
        body = {"text": "a"}
        assert (await stage.post("/generate", body))[0] == 401
        password = base64.b64encode(b"me:the-key").decode()
        for header in ("Bearer the-key", f"Basic {password}"):
            assert (await stage.post("/generate", body, headers={"Authorization": header}))[0] == 200
        assert {one.headers["Authorization"] for one in worker.requests} == {"Bearer the-key"}


async def test_only_admins_see_cluster_details_in_server_info_and_readiness(keys: dict[str, Path]) -> None:
    worker = FakeWorker(server_info={"api_key": "s3cret", "launch_command": "--api-key s3cret", "tp": 1})
    client = {"headers": {"Authorization": "Bearer key-a"}}
    admin = {"headers": {"Authorization": "Bearer root-key"}}
    async with staged(worker, **keys) as stage:
        told = []
        for path in ("/server_info", "/readiness"):
            for options in (client, admin):
                async with stage.client.get(stage.url(path), **options) as response:  # type: ignore[arg-type]
                    told.append((await response.text(), await response.json()))
        assert not any("s3cret" in text for text, _ in told)
        assert [worker.url in text for text, _ in told] == [False, True, False, False]
        assert ["workers" in page for _, page in told[:2]] == [False, True]
        assert ["not_ready" in page for _, page in told[2:]] == [False, True]
        assert told[0][1]["tp"] == 1


async def test_admin_changes_are_logged_with_the_admins_name(
    keys: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    admins = secret(tmp_path / "named", "root-key ops\n")

    async with staged(api_keys_file=keys["api_keys_file"], admin_api_key_file=admins) as stage:
        await status(stage, "POST", "/workers/a%20b/drain", Authorization="Bearer root-key")
        await status(stage, "POST", "/workers/other/drain")
        await status(stage, "GET", "/workers", Authorization="Bearer root-key")

    (line,) = (one.getMessage() for one in caplog.records if "change asked for" in one.getMessage())
    assert line.endswith("method=POST path=/workers/a%20b/drain admin=ops from=127.0.0.1")


async def test_a_browser_is_asked_for_the_key_by_basic_authentication(keys: dict[str, Path]) -> None:
    async with staged(**keys) as stage:
        async with stage.client.get(stage.url("/tree")) as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"].startswith("Basic")
        password = base64.b64encode(b"anybody:root-key").decode()
        assert await status(stage, "GET", "/tree", Authorization=f"Basic {password}") == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "wanted"),
    [
        ("POST", "/flush_cache", {"Origin": "http://elsewhere"}, 403),
        ("GET", "/flush_cache", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("GET", "/workers", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("GET", "/workers", {"Sec-Fetch-Site": "same-site"}, 403),
        ("GET", "/workers", {"Sec-Fetch-Site": "same-origin"}, 200),
        ("GET", "/workers", {"Sec-Fetch-Site": "none"}, 200),
        ("GET", "/workers", {"Host": "rebound.example"}, 403),
        ("GET", "/workers", {"Host": "rebound.example:1"}, 403),
        ("GET", "/workers", {"Host": "localhost:1"}, 200),
        ("GET", "/workers", {"Host": "[::1]:1"}, 200),
        ("GET", "/workers", {"Host": "192.0.2.1"}, 200),
        ("GET", "/workers", {"Host": "["}, 403),
        ("GET", "/v1/models", {"Host": "rebound.example"}, 200),
    ],
)
async def test_web_pages_of_other_sites_cannot_use_admin_endpoints(
    method: str, path: str, headers: dict[str, str], wanted: int
) -> None:
    async with staged(FakeWorker()) as stage:
        assert await status(stage, method, path, **headers) == wanted


async def test_no_spelling_of_a_path_bypasses_the_guard(keys: dict[str, Path]) -> None:
    async with staged(**keys) as stage:
        for path in ("/nothing", "/v1/nothing", "//workers", "/health/../workers", "/%77orkers/"):
            assert await status(stage, "GET", path) in (401, 404), path


def test_an_endpoint_without_an_entry_needs_an_admin_key() -> None:
    config = RouterConfig()
    ingress = build_ingress(config.http, config.auth, config.tls, config.admission, RouterMetrics())
    guard = Guard(ingress)
    assert guard.permission_of("/new") is Permission.ADMIN
    assert guard.permission_of("/v1/models/{model}") is Permission.CLIENT
    assert guard.permission_of("/abort_request") is Permission.CLIENT
    assert Permission.ADMIN not in PERMISSIONS.values()
