"""Capacity: prompts go to decodes that can hold them; a prompt that fits no decode is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from memserve.core.errors import BadRequest
from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.instance import ClusterSnapshot, Instance
from memserve.router.proxy.capacity import (
    check_fits,
    instances_that_fit,
    largest_capacity,
    smallest_capacity,
)
from memserve.router.request import Api
from memserve.router.server_info import ServerInfo, read_max_prompt_tokens
from memserve.testing.fake_worker import RESERVED_TOKENS, FakeWorker
from memserve.wire.messages import Role

from ..harness import staged
from .retry_harness import Ask

INFO = {"disaggregation_mode": "decode", "max_total_num_tokens": 2050}


def decode(name: str, room: int | None, role: Role = Role.DECODE) -> Instance:
    facts = ServerInfo("m", "/m", max_prompt_tokens=room)
    return Instance(InstanceId(name), Epoch(1), role, f"http://{name}:1", None, facts)


@pytest.mark.parametrize(
    ("said", "room"),
    [
        ({}, 1536),
        ({"num_reserved_decode_tokens": 50}, 2000),
        ({"num_reserved_decode_tokens": 4096}, 0),
        ({"max_total_num_tokens": None}, None),
        ({"disaggregation_mode": "prefill"}, None),
        ({"disaggregation_mode": "null"}, None),
        ({"enable_hisparse": True}, None),
        ({"disaggregation_decode_host_receive_threshold": 0.9}, None),
    ],
)
def test_max_prompt_tokens_is_the_cache_without_the_reserve_in_whole_pages(
    said: Any, room: int | None
) -> None:
    assert read_max_prompt_tokens({**INFO, **said}, 16) == room
    assert read_max_prompt_tokens({**INFO, **said}, None) is None


def test_instances_that_fit_leaves_out_decodes_with_a_smaller_cache() -> None:
    snapshot = ClusterSnapshot.of([decode("a", 100), decode("b", 200), decode("c", None)])
    assert [one.instance_id for one in instances_that_fit(snapshot, 150).decodes] == ["b", "c"]
    assert instances_that_fit(snapshot, 100) is snapshot
    assert smallest_capacity(snapshot) == 100
    assert smallest_capacity(ClusterSnapshot.of([decode("c", None)])) is None
    check_fits(snapshot, 9999, Api.GENERATE)
    assert largest_capacity(snapshot) is None, "one does not say"


def test_check_fits_refuses_only_prompts_that_no_instance_can_hold() -> None:
    check_fits(ClusterSnapshot.of([decode("a", 100), decode("b", None, Role.COLOCATED)]), 150, Api.CHAT)
    check_fits(ClusterSnapshot(), 150, Api.CHAT)
    snapshot = ClusterSnapshot.of([decode("a", 100), decode("b", 200)])
    check_fits(snapshot, 200, Api.CHAT)
    with pytest.raises(BadRequest, match=r"201 tokens.*room for 200"):
        check_fits(snapshot, 201, Api.CHAT)


async def test_long_prompt_goes_to_a_decode_that_can_hold_it() -> None:
    small, large = (
        FakeWorker(Role.DECODE, cache_tokens=tokens, context_tokens=8192) for tokens in (1024, 4096)
    )
    async with staged(
        FakeWorker(Role.PREFILL, context_tokens=8192), small, large, policy="round_robin"
    ) as stage:
        room = 1024 - RESERVED_TOKENS
        for _ in range(4):
            assert (await stage.post("/generate", {"input_ids": [1] * (room + 1)}))[0] == 200
            assert (await stage.post("/generate", {"input_ids": [[1] * (room + 1), [1]]}))[0] == 200
        assert (len(small.requests), len(large.requests)) == (0, 8)
        for _ in range(4):
            assert (await stage.post("/generate", {"input_ids": [1] * room}))[0] == 200
        assert len(small.requests) == 2

        status, answer = await stage.post("/generate", {"input_ids": [1] * 3585})
        error = answer["error"]
        assert (status, error["param"], error["retryable"]) == (400, "input_ids", False)
        assert "3585 tokens" in error["message"]
        assert "3584" in error["message"]
        assert len(large.requests) == 10


async def test_retry_answers_503_while_the_only_decode_with_room_is_away() -> None:
    """The request was admitted once: it is not refused because its only decode is away."""

    small, large = (
        FakeWorker(Role.DECODE, cache_tokens=tokens, context_tokens=8192) for tokens in (1024, 4096)
    )
    async with staged(FakeWorker(Role.PREFILL, context_tokens=8192), small, large) as stage:
        hold = asyncio.Event()
        large.script = type(large.script)(gates={0: hold})
        ask = Ask(stage, body={"input_ids": [1] * 1000})
        await large.until(lambda w: w.requests)
        await large.kill()
        status, answer = await ask.task
        assert (status, "was lost" in answer) == (503, True)
        assert not small.requests
