"""Instances join and leave: over the control plane, by URL, and by a crash."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
from aiohttp import web

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import InstanceLost
from memserve.router.cluster.discovery.static import STATIC_EPOCH
from memserve.router.server_info import read_server_info, read_vocab_size
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.link import ControlClient
from memserve.wire.messages import (
    Accepted,
    Deregister,
    Heartbeat,
    InstanceInfo,
    Message,
    Register,
    Role,
    Unknown,
)

from ..harness import info_of, pair, staged


async def ask(client: ControlClient, message: Message) -> Message:
    return await asyncio.to_thread(client.request, message, timeout_s=5.0)


async def test_instance_registers_sends_heartbeats_and_deregisters() -> None:
    async with staged() as stage, FakeWorker(Role.COLOCATED) as worker:
        client = ControlClient(stage.router.control_address)
        info = info_of(worker)
        beat = Heartbeat(info.instance_id, info.epoch)
        assert await ask(client, beat) == Unknown()
        assert isinstance(await ask(client, Register(info)), Accepted)
        await stage.until(stage.is_ready)
        assert (await stage.post("/generate", {"text": "a"}))[0] == 200
        assert isinstance(await ask(client, beat), Accepted)
        await ask(client, Deregister(info.instance_id, info.epoch))
        assert not stage.is_ready()
        assert await ask(client, beat) == Unknown()
        client.close()


async def test_control_plane_ignores_another_cluster_key(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    path.write_text("0123456789abcdef")
    path.chmod(0o600)
    async with staged(cluster_key_file=path) as stage, FakeWorker(Role.COLOCATED) as worker:
        register = Register(info_of(worker))
        stranger = ControlClient(stage.router.control_address, key=ClusterKey(b"another key, 16+"))
        with pytest.raises(InstanceLost):
            await asyncio.to_thread(stranger.request, register, timeout_s=0.3)
        member = ControlClient(stage.router.control_address, key=ClusterKey.read(path))
        assert isinstance(await ask(member, register), Accepted)
        stranger.close()
        member.close()


class Freezing(FakeWorker):
    """One that can stop in its tracks: its connections stay, and nothing comes."""

    is_frozen = False

    async def _model_info(self, request: web.Request) -> web.Response:
        while self.is_frozen:  # noqa: ASYNC110 nobody waits for the end of it but one test
            await asyncio.sleep(0.005)
        return await super()._model_info(request)


async def test_requests_of_a_silent_instance_are_retried_elsewhere() -> None:
    one, other = Freezing(), Freezing()
    async with staged(one, other, heartbeat_secs=0.1) as stage:

        async def live(*workers: FakeWorker) -> None:
            while True:
                for worker in workers:
                    info = info_of(worker)
                    if stage.router.cluster.heartbeat(info.instance_id, info.epoch) is None:
                        stage.router.cluster.register(info)
                await asyncio.sleep(0.01)

        living = asyncio.create_task(live(one, other))
        one.script = other.script = Script(gates={0: asyncio.Event()})
        request = asyncio.create_task(stage.post("/generate", {"text": "a"}))
        await stage.until(lambda: one.requests or other.requests)
        silent, well = (one, other) if one.requests else (other, one)
        silent.is_frozen = True
        well.script = Script()
        living.cancel()
        living = asyncio.create_task(live(well))
        assert (await request)[0] == 200
        assert (len(silent.requests), len(well.requests)) == (1, 1)
        living.cancel()


def named(worker: FakeWorker) -> InstanceInfo:
    info = info_of(worker, name=worker.url)
    return InstanceInfo(info.instance_id, STATIC_EPOCH, info.role, info.url, info.bootstrap_port)


async def test_static_servers_become_ready_when_they_start_and_restart() -> None:
    prefill, decode = pair()
    for worker in (prefill, decode):
        await worker.start()
    await decode.kill()
    async with staged(static=(named(prefill), named(decode))) as stage:
        await stage.until(lambda: stage.router.cluster.snapshot.prefills)
        status, answer = await stage.post("/generate", {"text": "a"})
        assert (status, answer["error"]["message"]) == (503, "no decode server is ready")
        await decode.start()
        await stage.until(stage.is_ready)
        assert (await stage.post("/generate", {"text": "a"}))[0] == 200

        await decode.kill()
        assert (await stage.post("/generate", {"text": "a"}))[0] == 503
        assert not stage.is_ready()
        await decode.start()
        back_s = time.monotonic()
        await stage.until(stage.is_ready)
        assert time.monotonic() - back_s < 2.0
        assert (await stage.post("/generate", {"text": "a"}))[0] == 200
        await prefill.kill()
        await decode.kill()


async def test_unhealthy_static_server_gets_no_requests() -> None:
    worker = FakeWorker(Role.COLOCATED, healthy=False)
    await worker.start()
    async with staged(static=(named(worker),)) as stage:
        await stage.until(lambda: "503" in stage.router.cluster.members()[0].reason)
        assert "/health answers 503" in json.dumps((await stage.get("/readiness"))[1])
        worker.healthy = True
        await stage.until(stage.is_ready)
    await worker.kill()


async def test_static_server_that_becomes_unhealthy_is_taken_out() -> None:
    worker = FakeWorker(Role.COLOCATED)
    await worker.start()
    async with staged(static=(named(worker),), health_check_interval_secs=0.05) as stage:
        await stage.until(stage.is_ready)
        worker.healthy = False
        await stage.until(lambda: not stage.is_ready())
    await worker.kill()


async def test_hanging_static_server_is_suspect_until_it_answers() -> None:
    hangs, works = Freezing(), FakeWorker()
    await hangs.start()
    await works.start()
    probes = {"health_check_interval_secs": 0.05, "slow_health_check_secs": 0.05}
    async with staged(static=(named(hangs), named(works)), **probes) as stage:
        snapshot = lambda: stage.router.cluster.snapshot.colocated  # noqa: E731
        await stage.until(lambda: len(snapshot()) == 2)
        hangs.is_frozen = True
        await stage.until(lambda: len(snapshot()) == 1)
        shown = (await stage.get(f"/workers/{hangs.url}"))[1]
        assert (shown["state"], "health check" in shown["reason"]) == ("suspect", True)
        for _ in range(4):
            assert (await stage.post("/generate", {"text": "a"}))[0] == 200
        assert not hangs.requests
        hangs.is_frozen = False
        await stage.until(lambda: len(snapshot()) == 2)
        assert (await stage.get(f"/workers/{hangs.url}"))[1]["reason"] is None
    await hangs.kill()
    await works.kill()


async def test_static_server_with_the_wrong_role_gets_no_requests() -> None:
    async with FakeWorker(Role.PREFILL) as worker:
        wrong = InstanceInfo(named(worker).instance_id, STATIC_EPOCH, Role.DECODE, worker.url)
        async with staged(static=(wrong,)) as stage:
            await stage.until(lambda: "runs as prefill" in stage.router.cluster.members()[0].reason)


async def test_new_process_replaces_a_killed_one() -> None:
    async with staged(*pair()) as stage:
        stage.decode.script = Script(gates={0: asyncio.Event()})
        request = asyncio.create_task(stage.post("/generate", {"text": "a"}))
        await stage.decode.until(lambda w: w.requests)
        await stage.decode.kill()
        status, answer = await asyncio.wait_for(request, 1.0)
        assert (status, answer["error"]["retryable"]) == (503, True)
        await stage.prefill.until(lambda w: w.requests[0].dropped or w.requests[0].finished)
        stage.decode.script = Script()
        await stage.decode.start()
        back_s = time.monotonic()
        stage.router.cluster.register(info_of(stage.decode, epoch=2))
        await stage.until(stage.is_ready)
        assert time.monotonic() - back_s < 1.0
        assert (await stage.post("/generate", {"text": "a"}))[0] == 200


PAGES = (
    b'{"model_path": "/m", "served_model_name": "m"}',
    b'{"disaggregation_mode": "null", "page_size": 16}',
    b'{"data": [{"id": "m", "max_model_len": 99}]}',
)


def test_read_server_info_reads_sglangs_pages() -> None:
    facts = read_server_info("http://h:1", Role.COLOCATED, *PAGES)
    assert (facts.model, facts.model_path, facts.context_tokens, facts.page_size) == ("m", "/m", 99, 16)
    assert facts.vocab_size is None
    assert not facts.is_on_cpu
    on_cpu = (PAGES[0], PAGES[1].replace(b"{", b'{"device": "cpu", '), PAGES[2])
    assert read_server_info("http://h:1", Role.COLOCATED, *on_cpu).is_on_cpu


@pytest.mark.parametrize("number", [0, 1, 2])
def test_read_server_info_refuses_pages_of_other_programs(number: int) -> None:
    pages = list(PAGES)
    for wrong in (b"[]", b"<html>"):
        pages[number] = wrong
        with pytest.raises(ValueError):  # noqa: PT011 (msgspec's, json's or ours: all say it is malformed)
            read_server_info("http://h:1", Role.COLOCATED, *pages)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ('{"vocab_size": 7}', 7),
        ('{"text_config": {"vocab_size": 8}}', 8),
        ("{}", None),
        ("nonsense", None),
        (None, None),
    ],
)
def test_read_vocab_size_reads_the_models_config(
    tmp_path: Path, config: str | None, expected: int | None
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert read_vocab_size(str(tmp_path)) == expected
