"""The JSON data of /ui: correct, bounded, and without prompts unless configured."""

from __future__ import annotations

import time
from typing import Any

import pytest

from memserve.core.block_keys import page_keys
from memserve.core.caching import CachingMode
from memserve.core.ids import Epoch, InstanceId
from memserve.router.records import RequestRecord
from memserve.scheduling.context import Prompt
from memserve.scheduling.decision import Decision
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Load, PoolInfo, Role, TierBlocks

from ..harness import Stage, pair, staged

TOKENS = list(range(64))


def log(stage: Stage, rid: str, status: int = 200, decision: Decision | None = None, **others: Any) -> None:
    one = RequestRecord(
        time.time(), "/generate", rid, f"x-{rid}", status, 0.5, "a+b", "-",
        decision=decision, prompt_tokens=None if decision is None else 64, **others,
    )  # fmt: skip
    stage.router.state.telemetry.requests.add(one)


def decision(stage: Stage, unknown: str | None = None) -> Decision:
    prompt = Prompt(64, (page_keys(TOKENS, 16),) if unknown is None else (), unknown=unknown)
    made = stage.router.state.scheduler.decide(stage.router.cluster.snapshot, prompt)
    assert made is not None
    return made


@pytest.mark.parametrize("path", ["/ui", "/ui/app.js", "/ui/draw.js", "/ui/explain.js", "/ui/style.css"])
async def test_dashboard_page_loads_only_files_of_the_package(path: str) -> None:
    async with staged(*pair()) as stage, stage.client.get(stage.url(path)) as response:
        text = await response.text()
        assert response.status == 200
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "http://" not in text.replace("http://www.w3.org/", "")
        assert "https://" not in text
        assert "innerHTML" not in text
        assert "style=" not in text


@pytest.mark.parametrize("name", ["nothing.js", "..%2fui.py", "%2e%2e/ui.py", "index.html/"])
async def test_dashboard_answers_404_for_unknown_files(name: str) -> None:
    async with staged(*pair()) as stage:
        assert (await stage.get(f"/ui/{name}"))[0] == 404


async def test_ui_state_lists_all_instances() -> None:
    async with staged(*pair()) as stage:
        status, page = await stage.get("/ui/state")
        assert status == 200
        assert page["reason_unready"] is None
        assert {(one["role"], one["state"], one["running"]) for one in page["instances"]} == {
            ("prefill", "ready", 0),
            ("decode", "ready", 0),
        }
        stage.router.cluster.drain(stage.router.cluster.members()[0])
        _, page = await stage.get("/ui/state")
        assert page["reason_unready"]
        assert "draining" in {one["state"] for one in page["instances"]}


async def test_ui_state_shows_the_reports_of_instances_and_pools() -> None:
    async with staged(*pair()) as stage:
        cluster, pools = stage.router.cluster, stage.router.pools
        prefill = cluster.members()[0]
        name = prefill.info.instance_id
        prefill.load = Load(1, 0, 160, max_tokens=1600, step_age_s=7.5)
        for rank, name_of in enumerate((f"{name}/dp0", f"{name}/dp1", "memory-1")):
            role = Role.MEMORY if name_of == "memory-1" else Role.PREFILL
            address = f"127.0.0.1:{rank + 1}"
            info = PoolInfo(InstanceId(name_of), Epoch(rank + 1), role, CachingMode.FULL, address, "layout")
            pools.register(info)
            pools.heartbeat(info.epoch, 0, (TierBlocks("hbm", 5), TierBlocks("dram", 30, 60, 100)))
        told = {one["instance_id"]: one for one in (await stage.get("/ui/state"))[1]["instances"]}
        assert (told[name]["dram_blocks"], told[name]["dram_capacity"]) == (80, 200)
        assert (told[name]["hbm_capacity"], told[name]["load"]["step_age_s"]) == (100, 7.5)
        assert (told["memory-1"]["role"], told["memory-1"]["dram_capacity"]) == ("memory", 100)


async def test_hottest_prefixes_list_their_holders() -> None:
    worker = FakeWorker(Role.COLOCATED, cache_tokens=1 << 16)
    async with staged(worker) as stage:
        await stage.until(stage.router.state.subscriptions.stats)
        for last in range(3):
            await stage.post("/generate", {"input_ids": [*TOKENS, *[last] * 16]})
        stage.router.state.telemetry.prefixes.tick(time.monotonic())
        _, page = await stage.get("/tree/hottest?n=1")
        (prefix,) = page["prefixes"]
        assert (prefix["blocks"], prefix["tokens"], prefix["sample"]) == (4, 64, None)
        assert prefix["holders"] == [{"instance": f"colocated-{worker.port}", "tier": "hbm"}]
        assert prefix["key"] == page_keys(TOKENS, 16)[-1].hex()[:16]


@pytest.mark.parametrize("shown", [True, False])
async def test_dashboard_shows_prompts_only_with_ui_show_prompts(shown: bool) -> None:
    secret = "the secret plan "
    async with staged(*pair(), ui_show_prompts=shown) as stage:
        prefixes = stage.router.state.telemetry.prefixes
        for _ in range(3):
            prefixes.note(Prompt(64, (page_keys(TOKENS, 16),)), prefixes.sample({"text": secret * 4}))
            await stage.post("/generate", {"text": secret * 4})
        prefixes.tick(time.monotonic())
        _, page = await stage.get("/ui/state")
        assert page["shows_prompts"] == shown
        for path in ("/ui/state", "/tree/hottest", "/requests"):
            async with stage.client.get(stage.url(path)) as response:
                told = secret in await response.text()
                assert told == (shown and path != "/requests"), path


async def test_recent_requests_are_listed_and_explained() -> None:
    async with staged(*pair()) as stage:
        log(stage, "good", decision=decision(stage), cached_tokens=32)
        log(stage, "bad", 502)
        _, page = await stage.get("/requests")
        assert [one["rid"] for one in page["requests"]] == ["bad", "good"]
        assert page["requests"][1]["expected_tokens"] == 0
        assert "decision" not in page["requests"][1]
        _, page = await stage.get("/requests?faults=1&n=5")
        assert [one["rid"] for one in page["requests"]] == ["bad"]
        for name in ("good", "x-good"):
            status, one = await stage.get(f"/requests/{name}")
            assert (status, one["cached_tokens"]) == (200, 32)
            assert one["decision"]["prefill"].startswith("prefill-")
            assert one["decision"]["prefill_candidates"][0]["blocks"] == 0
            assert one["decision"]["reason"]
        assert (await stage.get("/requests/bad"))[1]["decision"] is None
        status, answer = await stage.get("/requests/nobody's")
        assert (status, answer["error"]["param"]) == (404, "rid")


@pytest.mark.parametrize("is_lean", [True, False])
@pytest.mark.parametrize("stream", [True, False])
async def test_request_log_keeps_a_request_when_it_ends(stream: bool, is_lean: bool) -> None:
    headers = {"x-request-id": "mine"} | ({} if is_lean else {"upgrade": "nothing"})
    body = {"text": "hello", "stream": stream, "rid": "theirs"}
    async with staged(*pair()) as stage:
        async with stage.client.post(stage.url("/generate"), json=body, headers=headers) as response:
            sent = await response.read()
        status, one = await stage.get("/requests/theirs")
        assert status == 200, one
        assert (one["path"], one["status"], one["request_id"]) == ("/generate", 200, "mine")
        assert one["num_events"] == (sent.count(b"data: ") if stream else 0)
        assert 0 < one["first_token_s"] <= one["seconds"]
        assert (one["attempts"], one["reason"], one["cached_tokens"]) == (1, "-", 0)
        assert one["instances"] == f"prefill-{stage.prefill.port}+decode-{stage.decode.port}"
        assert one["decision"]["decode"] == f"decode-{stage.decode.port}"


async def test_request_log_keeps_refused_requests() -> None:
    async with staged(*pair()) as stage:
        await stage.post("/generate", {"text": 5}, headers={"x-request-id": "mine"})
        _, one = await stage.get("/requests/mine")
        assert (one["status"], one["rid"], one["attempts"], one["decision"]) == (400, "-", 0, None)
        assert (one["instances"], one["prompt_tokens"]) == ("-", None)
        assert "text" in one["reason"]


async def test_request_log_keeps_why_tokens_were_unknown() -> None:
    async with staged(*pair()) as stage:
        log(stage, "image", decision=decision(stage, "images"), unknown="images")
        assert (await stage.get("/requests/image"))[1]["decision"]["tokens_unknown"] == "images"


@pytest.mark.parametrize("path", ["/requests?n=0", "/requests?n=1001", "/tree/hottest?n=x", "/requests?n=²"])
async def test_requests_page_refuses_an_invalid_number(path: str) -> None:
    async with staged(*pair()) as stage:
        status, answer = await stage.get(path)
        assert (status, answer["error"]["param"]) == (400, "n")


@pytest.mark.parametrize(
    "path", ["/ui", "/ui/app.js", "/ui/state", "/tree/hottest", "/requests", "/requests/x"]
)
async def test_all_dashboard_endpoints_need_an_admin_key(path: str) -> None:
    async with staged(*pair(), api_key="open sesame") as stage:
        async with stage.client.get(stage.url(path)) as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"].startswith("Basic")
        key = {"Authorization": "Bearer open sesame"}
        async with stage.client.get(stage.url(path), headers=key) as response:
            assert response.status == (404 if path == "/requests/x" else 200)
