"""Tenants are identified by their keys and share no cached blocks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import Stage, staged

KEYS = "# keys\n\nkey-a alice\nkey-b bob\nkey-a2 alice\n"
PROMPT = list(range(100, 612))


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return write(tmp_path / "keys", KEYS)


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def auth(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def depths(stage: Stage, key: str, **fields: Any) -> set[int]:
    status, told = await stage.post("/explain", {"input_ids": PROMPT, **fields}, headers=auth(key))
    assert status == 200, told
    return {one["blocks"] for one in told["prefill_candidates"]}


async def test_tenants_share_no_cached_blocks_whatever_salt_they_send(keys_file: Path) -> None:
    worker = FakeWorker(Role.COLOCATED, cache_tokens=1 << 16, context_tokens=4096)
    async with staged(worker, api_keys_file=keys_file) as stage:
        await stage.until(stage.router.state.subscriptions.stats)
        assert (await stage.post("/generate", {"input_ids": PROMPT}))[0] == 401
        assert (await stage.post("/explain", {"input_ids": PROMPT}))[0] == 401
        assert not worker.requests
        body = {"input_ids": PROMPT}
        assert (await stage.post("/generate", body, headers=auth("key-a")))[0] == 200
        salt = worker.requests[0].body["cache_salt"]
        assert "authorization" not in {name.lower() for name in worker.requests[0].headers}
        assert await depths(stage, "key-a") == await depths(stage, "key-a2") == {32}
        assert await depths(stage, "key-b") == {0}
        assert await depths(stage, "key-b", cache_salt=salt) == {0}, "a salt is no key to another's cache"
        assert await depths(stage, "key-a", cache_salt="mine") == {0}
        batch = {"input_ids": [PROMPT, PROMPT], "cache_salt": ["x", "y"]}
        assert (await stage.post("/generate", batch, headers=auth("key-b")))[0] == 200
        salts = worker.requests[1].body["cache_salt"]
        assert len({salt, *salts}) == 3


async def test_chats_and_completions_are_salted_by_tenant(keys_file: Path) -> None:
    worker = FakeWorker(Role.COLOCATED)
    async with staged(worker, api_keys_file=keys_file) as stage:
        chat = {"messages": [{"role": "user", "content": "hello"}]}
        for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "hello"})):
            assert (await stage.post(path, body))[0] == 401
            assert (await stage.post(path, body, headers=auth("key-b")))[0] == 200
        assert len({request.body["cache_salt"] for request in worker.requests}) == 1


async def test_a_tenants_rid_aborts_no_request_of_another_tenant(keys_file: Path) -> None:
    """Servers abort by rid prefix: a client's own rid could be a prefix of another tenant's."""

    gate = asyncio.Event()
    worker = FakeWorker(Role.COLOCATED, Script(gates={0: gate}))
    async with staged(worker, api_keys_file=keys_file) as stage:
        body = {"text": "hello", "rid": "mine"}
        first = asyncio.create_task(stage.post("/generate", body, headers=auth("key-a")))
        second = asyncio.create_task(stage.post("/generate", {"text": "hello"}, headers=auth("key-b")))
        third = asyncio.create_task(stage.post("/generate", body, headers=auth("key-b")))
        await worker.until(lambda it: len(it.requests) == 3)
        names = [one.rids[0] for one in worker.requests]
        assert not any(a.startswith(b) for a in names for b in names if a is not b)
        third.cancel()
        await worker.until(lambda it: it.aborts)
        gate.set()
        for task in (first, second):
            assert (await task)[0] == 200
        (aborted,) = set(worker.aborts)
        assert aborted in names
        assert (await first)[1]["meta_info"]["id"] == "mine"


async def test_a_stream_shows_the_clients_own_rid(keys_file: Path) -> None:
    worker = FakeWorker(Role.COLOCATED)
    async with staged(worker, api_keys_file=keys_file) as stage:
        body = {"text": "hello", "rid": "mine", "stream": True}
        events = await stage.events("/generate", body, headers=auth("key-a"))
        assert b'"mine"' in events[0]
        assert worker.requests[0].rids != ["mine"]


async def test_explain_takes_the_tenant_from_an_admins_header(keys_file: Path, tmp_path: Path) -> None:
    worker = FakeWorker(Role.COLOCATED, cache_tokens=1 << 16, context_tokens=4096)
    admins = write(tmp_path / "admins", "root-key\n")
    async with staged(worker, api_keys_file=keys_file, admin_api_key_file=admins) as stage:
        await stage.until(stage.router.state.subscriptions.stats)
        assert (await stage.post("/generate", {"input_ids": PROMPT}, headers=auth("key-a")))[0] == 200
        for key, name, wanted in (
            ("root-key", "alice", {32}),
            ("root-key", "bob", {0}),
            ("key-b", "alice", {0}),
        ):
            headers = {**auth(key), "x-memserve-tenant": name}
            status, told = await stage.post("/explain", {"input_ids": PROMPT}, headers=headers)
            assert status == 200, told
            assert {one["blocks"] for one in told["prefill_candidates"]} == wanted
        assert (await stage.post("/explain", {"input_ids": PROMPT}, headers=auth("root-key")))[0] == 400
        assert (await stage.post("/generate", {"input_ids": PROMPT}, headers=auth("root-key")))[0] == 401
