"""Kubernetes discovery against a fake API server: real lists and watches, and their failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from memserve.core.errors import ConfigError
from memserve.router.cluster.discovery.config import DiscoveryConfig
from memserve.router.cluster.discovery.kubernetes import LAST_RETRY_S, PodApi, retry_s
from memserve.router.cluster.discovery.pods import ListExpired, read_change, read_list, server_in
from memserve.router.command_line import parse_args
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import Stage, staged

ANY = {"text": "a", "sampling_params": {"max_new_tokens": 2}}


def pod(name: str, *, ip: str = "127.0.0.1", ready: bool = True, **meta: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": "7", **meta},
        "spec": {"containers": []},
        "status": {
            "phase": "Running",
            "podIP": ip,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


class FakeKubernetes:
    """Lists and watches pods, as `pods` and `say` have it."""

    def __init__(self) -> None:
        self.pods: list[Any] = []
        self.asked: list[dict[str, str]] = []
        self.tokens: list[str | None] = []
        self.paths: list[str] = []
        self.refuses = 0
        """The next answers to a watch, that many, are 410."""
        self._watches: list[asyncio.Queue[bytes | None]] = []
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app)
        self.url = ""

    async def start(self, port: int = 0) -> None:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        self.hang_up()
        await self._runner.cleanup()

    @property
    def num_watched(self) -> int:
        return len(self._watches)

    @property
    def num_listed(self) -> int:
        return sum("watch" not in params for params in self.asked)

    def say(self, kind: str, what: Any) -> None:
        self.write(json.dumps({"type": kind, "object": what}).encode() + b"\n")

    def write(self, data: bytes) -> None:
        for watch in self._watches:
            watch.put_nowait(data)

    def hang_up(self) -> None:
        for watch in self._watches:
            watch.put_nowait(None)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(dict(request.query))
        self.tokens.append(request.headers.get("Authorization"))
        self.paths.append(request.path)
        if "watch" not in request.query:
            return web.json_response({"metadata": {"resourceVersion": "5"}, "items": self.pods})
        if self.refuses:
            self.refuses -= 1
            return web.Response(status=410)
        response = web.StreamResponse()
        await response.prepare(request)
        said: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._watches.append(said)
        try:
            while (data := await said.get()) is not None:
                await response.write(data)
        finally:
            self._watches.remove(said)
        return response


@asynccontextmanager
async def discovering(
    *workers: FakeWorker, kubernetes: FakeKubernetes | None = None, **settings: Any
) -> AsyncIterator[tuple[Stage, FakeKubernetes]]:
    """A router that looks for pods at the port of the first worker."""
    api = kubernetes or FakeKubernetes()
    for worker in workers:
        await worker.start()
    await api.start()
    config = DiscoveryConfig(
        selectors=settings.pop("selectors", {Role.COLOCATED: ("app=sglang", "tier=gpu")}),
        port=workers[0].port,
        api_server=api.url,
        **settings,
    )
    try:
        async with staged(discovery=config) as stage:
            yield stage, api
    finally:
        await api.close()
        for worker in workers:
            await worker.kill()


def urls(stage: Stage) -> list[str]:
    return [member.info.url for member in stage.router.cluster.members()]


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memserve.router.cluster.discovery.kubernetes.FIRST_RETRY_S", 0.01)


async def test_discovery_adds_ready_pods_and_removes_deleted_ones() -> None:
    worker, api = FakeWorker(), FakeKubernetes()
    api.pods = [pod("one"), pod("not ready", ip="127.0.0.2", ready=False)]
    async with discovering(worker, kubernetes=api) as (stage, _):
        await stage.until(stage.is_ready)
        assert urls(stage) == [worker.url]
        assert (await stage.post("/generate", ANY))[0] == 200
        assert api.asked[0] == {"labelSelector": "app=sglang,tier=gpu"}
        await stage.until(lambda: api.num_watched)
        assert api.asked[1]["resourceVersion"] == "5"
        api.say("DELETED", pod("one"))
        await stage.until(lambda: not urls(stage))
        assert (await stage.post("/generate", ANY))[0] == 503


async def test_discovery_follows_a_pods_readiness() -> None:
    worker = FakeWorker()
    async with discovering(worker) as (stage, api):
        await stage.until(lambda: api.num_watched)
        api.say("ADDED", pod("one", ready=False))
        api.say("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": "6"}})
        api.say("MODIFIED", pod("one"))
        await stage.until(stage.is_ready)
        gate = asyncio.Event()
        worker.script = Script(gates={1: gate})
        request = asyncio.create_task(stage.post("/generate", ANY))
        await worker.until(lambda w: w.requests)
        api.say("MODIFIED", pod("one", deletionTimestamp="2026-01-01T00:00:00Z"))
        await stage.until(lambda: not stage.is_ready())
        assert urls(stage) == [worker.url], "it may end what it has"
        # It changes its mind, as pods do when a readiness check fails once.
        api.say("MODIFIED", pod("one"))
        await stage.until(stage.is_ready)
        api.say("MODIFIED", pod("one", ready=False))
        await stage.until(lambda: not stage.is_ready())
        gate.set()
        assert (await request)[0] == 200
        await stage.until(lambda: not urls(stage))


async def test_discovery_finds_a_pair_by_two_selectors() -> None:
    worker, api = FakeWorker(Role.DECODE), FakeKubernetes()
    selectors = {Role.PREFILL: ("role=prefill",), Role.DECODE: ("role=decode",)}
    async with discovering(worker, kubernetes=api, selectors=selectors) as (stage, _):
        await stage.until(lambda: api.num_watched == 2)
        assert {params["labelSelector"] for params in api.asked} == {"role=prefill", "role=decode"}


async def test_discovery_resumes_an_ended_watch_at_its_version() -> None:
    async with discovering(FakeWorker()) as (stage, api):
        await stage.until(lambda: api.num_watched)
        api.say("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": "6"}})
        api.hang_up()
        await stage.until(lambda: len(api.asked) == 3 and api.num_watched)
        assert api.asked[2]["resourceVersion"] == "6"
        assert api.num_listed == 1
        api.say("ADDED", pod("one"))
        await stage.until(stage.is_ready)


@pytest.mark.parametrize("how", ["status", "event"])
async def test_discovery_lists_again_after_410_gone(how: str) -> None:
    async with discovering(FakeWorker()) as (stage, api):
        await stage.until(lambda: api.num_watched)
        api.say("ADDED", pod("gone meanwhile"))
        await stage.until(stage.is_ready)
        if how == "status":
            api.refuses = 2
            api.hang_up()
        else:
            api.say("ERROR", {"kind": "Status", "code": 410, "message": "too old"})
        await stage.until(lambda: not urls(stage))
        assert api.num_listed >= 2
        await stage.until(lambda: api.num_watched)
        api.say("ADDED", pod("another"))
        await stage.until(stage.is_ready)


async def test_discovery_skips_malformed_objects_only() -> None:
    worker, api = FakeWorker(), FakeKubernetes()
    api.pods = [17, {"metadata": {}}, {"metadata": {"name": ["a"]}}, pod("v6", ip="::::::")]
    async with discovering(worker, kubernetes=api) as (stage, _):
        await stage.until(lambda: api.num_watched)
        for line in (b"no json\n", b"\n", b"{}\n", b"[]\n", b"\xff\xfe\n", b'{"type": "ADDED"}\n'):
            api.write(line)
        api.say("ADDED", {"metadata": {"name": "x"}, "status": {"phase": 3}})
        api.say("NONSENSE", {"metadata": {"name": "x"}})
        whole = json.dumps({"type": "ADDED", "object": pod("one")}).encode() + b"\n"
        api.write(whole[:50])
        api.write(whole[50:])
        await stage.until(stage.is_ready)
        assert worker.url in urls(stage)
        assert api.num_listed == 1


async def test_discovery_keeps_workers_while_the_api_is_unreachable() -> None:
    async with discovering(FakeWorker()) as (stage, api):
        await stage.until(lambda: api.num_watched)
        api.say("ADDED", pod("one"))
        await stage.until(stage.is_ready)
        port = int(api.url.rsplit(":", 1)[1])
        await api.close()
        assert (await stage.post("/generate", ANY))[0] == 200
        again = FakeKubernetes()
        again.pods = [pod("one")]
        await again.start(port)
        await stage.until(lambda: again.num_watched)
        assert stage.is_ready()
        await again.close()


async def test_discovery_leaves_servers_added_by_others() -> None:
    worker = FakeWorker()
    async with discovering(worker) as (stage, api):
        status, _ = await stage.post("/workers", {"url": worker.url})
        assert status == 201
        await stage.until(lambda: api.num_watched)
        for kind in ("ADDED", "DELETED"):
            api.say(kind, pod("one"))
        api.say("ADDED", pod("two", ip="127.0.0.2"))
        await stage.until(lambda: len(urls(stage)) == 2)
        assert worker.url in urls(stage)
        await stage.until(stage.is_ready)


async def test_pod_api_rereads_its_token_and_uses_its_namespace(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    async with discovering(FakeWorker(), token_file=token, namespace="here") as (stage, api):
        await stage.until(lambda: api.num_watched)
        token.write_text("second\n")
        api.hang_up()
        await stage.until(lambda: len(api.asked) == 3)
        assert api.tokens == ["Bearer first", "Bearer first", "Bearer second"]
        assert set(api.paths) == {"/api/v1/namespaces/here/pods"}


@pytest.mark.parametrize(
    ("annotations", "port"),
    [(None, 8998), ({}, 8998), ({"sglang.ai/bootstrap-port": "9001"}, 9001)]
    + [({"sglang.ai/bootstrap-port": bad}, None) for bad in ("", "x", "0", "65536", "-1", "٣")],
)
def test_prefill_pod_gives_its_bootstrap_port_by_annotation(
    annotations: dict[str, str] | None, port: int | None
) -> None:
    config = DiscoveryConfig({Role.PREFILL: ("a=b",)}, port=8000)
    items = [pod("p", ip="fd00::1", annotations=annotations)]
    _, pods = read_list(json.dumps({"metadata": {}, "items": items}).encode())
    info = server_in(pods[0], Role.PREFILL, config)
    if port is None:
        assert info is None
    else:
        assert info is not None
        assert (info.url, info.bootstrap_port) == ("http://[fd00::1]:8000", port)


def test_read_change_raises_the_apis_errors() -> None:
    with pytest.raises(ListExpired):
        read_change(b'{"type": "ERROR", "object": {"code": 410}}')
    with pytest.raises(ConnectionError, match="500 no"):
        read_change(b'{"type": "ERROR", "object": {"code": 500, "message": "no"}}')


def test_discovery_retries_back_off_with_jitter() -> None:
    delays = [retry_s(num, 1.0) for num in (1, 2, 3, 100)]
    assert delays == sorted(delays)
    assert delays[-1] == LAST_RETRY_S
    assert retry_s(3, 0.0) < retry_s(3, 1.0)


def test_discovery_flags_are_those_of_sglang_router() -> None:
    argv = "--service-discovery --selector app=sglang tier=gpu --service-discovery-port 8000"
    config = parse_args([*argv.split(), "--service-discovery-namespace", "prod"]).config.discovery
    assert config is not None
    assert config.selectors == {Role.COLOCATED: ("app=sglang", "tier=gpu")}
    assert (config.port, config.namespace) == (8000, "prod")
    argv = "--service-discovery --prefill-selector role=p --decode-selector role=d"
    config = parse_args(argv.split()).config.discovery
    assert config is not None
    assert config.selectors == {Role.PREFILL: ("role=p",), Role.DECODE: ("role=d",)}
    assert parse_args([]).config.discovery is None


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--service-discovery", "--selector"),
        ("--selector a=b", "--service-discovery"),
        ("--service-discovery --selector app", "NAME=VALUE"),
        ("--service-discovery --selector a=b,c=d", "NAME=VALUE"),
        ("--service-discovery --selector a=b --service-discovery-port 0", "port"),
        ("--service-discovery --selector a=b --kube-api-server kube:443", "http"),
    ],
)
def test_discovery_flags_refuse_invalid_values(argv: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_args(argv.split())


def test_pod_api_needs_an_address_outside_of_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="--kube-api-server"):
        PodApi(DiscoveryConfig({Role.COLOCATED: ("a=b",)}))
