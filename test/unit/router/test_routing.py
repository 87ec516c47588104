"""Routing as a client sees it: over HTTP, in front of workers that report nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from memserve.core.ids import InstanceId
from memserve.router.cluster.member import State
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from .harness import Stage, info_of, pair, staged

CACHE_TOKENS = 1 << 16


def worker(role: Role = Role.COLOCATED, **settings: Any) -> FakeWorker:
    return FakeWorker(role, cache_tokens=CACHE_TOKENS, context_tokens=4096, **settings)


def ids(seed: int, count: int = 512) -> list[int]:
    return [seed * 1000 + i for i in range(count)]


async def followed(stage: Stage, count: int) -> None:
    """Until the router has begun to note what these workers are sent."""
    followers = stage.router.state.subscriptions
    await stage.until(lambda: len(followers.stats()) == count)


async def generate(stage: Stage, tokens: list[int], **kwargs: Any) -> None:
    status, answer = await stage.post("/generate", {"input_ids": tokens}, **kwargs)
    assert status == 200, answer


async def test_conversation_stays_at_the_instance_with_its_history() -> None:
    workers = [worker() for _ in range(4)]
    async with staged(*workers) as stage:
        await followed(stage, 4)
        for turn in range(3):
            for user in range(8):
                await generate(stage, ids(user, 512 + 64 * turn))
        for one in workers:
            seen = {tuple(request.body["input_ids"][:512]) for request in one.requests}
            assert (len(one.requests), len(seen)) == (6, 2)


@pytest.mark.parametrize("connections", [1, 2, 4, 8, 16, 32])
async def test_cold_prompts_spread_at_any_concurrency(connections: int) -> None:
    workers = [worker() for _ in range(4)]
    async with staged(*workers) as stage:
        await followed(stage, 4)
        waiting = list(range(160))

        async def client() -> None:
            while waiting:
                await generate(stage, ids(waiting.pop()))

        await asyncio.gather(*(client() for _ in range(connections)))
        shares = [len(one.requests) for one in workers]
        assert max(shares) <= 1.3 * min(shares), shares


async def test_pair_is_chosen_leg_by_leg() -> None:
    prefills, decodes = ([worker(role) for _ in range(2)] for role in (Role.PREFILL, Role.DECODE))
    async with staged(*prefills, *decodes) as stage:
        await followed(stage, 4)
        for user in (0, 1, 0, 1, 0, 1):
            await generate(stage, ids(user))
        for legs in (prefills, decodes):
            assert sorted(len(one.requests) for one in legs) == [3, 3]
            for one in legs:
                assert len({request.body["input_ids"][0] for request in one.requests}) == 1


async def test_explain_dispatches_nothing_and_lists_every_candidate() -> None:
    workers = [worker() for _ in range(3)]
    async with staged(*workers) as stage:
        await followed(stage, 3)
        await generate(stage, ids(0))
        (home,) = [one for one in workers if one.requests]
        status, told = await stage.post("/explain", {"input_ids": ids(0)})
        assert status == 200
        assert told["prefill"] == info_of(home).instance_id
        assert told["prefill"] in told["reason"]
        assert sum(len(one.requests) for one in workers) == 1
        depths = {one["instance"]: one["blocks"] for one in told["prefill_candidates"]}
        assert len(depths) == 3
        assert depths[told["prefill"]] == 32
        assert all(
            {"queue_s", "exec_s", "load_s", "hbm_blocks"} <= one.keys() for one in told["prefill_candidates"]
        )
        chat = {"messages": [{"role": "user", "content": "hello"}]}
        assert (await stage.post("/explain", chat))[1]["tokens_unknown"]
        assert (await stage.post("/explain", {"text": 1}))[0] == 400


async def test_report_header_explains_any_request() -> None:
    async with staged(worker()) as stage:
        await followed(stage, 1)
        for stream in (False, True):
            body, headers = {"input_ids": ids(0), "stream": stream}, {"x-memserve-explain": "1"}
            async with stage.client.post(stage.url("/generate"), json=body, headers=headers) as answer:
                told = json.loads(answer.headers["x-memserve-decision"])
                assert told["prefill"] == info_of(stage.colocated).instance_id
        async with stage.client.post(stage.url("/generate"), json={"input_ids": ids(0)}) as answer:
            assert "x-memserve-decision" not in answer.headers


async def test_tree_page_counts_blocks_by_instance_and_tier() -> None:
    async with staged(worker()) as stage:
        await followed(stage, 1)
        await generate(stage, ids(0))
        held = (await stage.get("/tree"))[1]["instances"]
        assert len(held) == 1
        assert all(set(counts) == {"hbm", "dram"} for counts in held.values())


async def test_explain_says_why_tokens_are_unknown() -> None:
    async with staged(worker()) as stage:
        ready = (await stage.get("/readiness"))[1]
        assert "tokenizer.json" in ready["placed_without_tokens"]["fake-model"]
        assert (await stage.post("/generate", {"text": "hello"}))[0] == 200
        async with stage.client.get(stage.url("/metrics")) as answer:
            text = await answer.text()
        assert "memserve_router_unknown_tokens_total{reason=" in text
        assert 'memserve_router_requests_total{path="/generate",status="200"} 1.0' in text
        assert 'memserve_router_models_without_tokens{model="fake-model"} 1.0' in text


async def test_session_keeps_its_instance_without_tokens() -> None:
    workers = [worker() for _ in range(4)]
    async with staged(*workers) as stage:
        for _ in range(6):
            body = {"text": "hello"}
            assert (await stage.post("/generate", body, headers={"x-session-id": "me"}))[0] == 200
            chat = {"messages": [{"role": "user", "content": "hello"}], "user": "me"}
            assert (await stage.post("/v1/chat/completions", chat))[0] == 200
        assert sorted(len(one.requests) for one in workers) == [0, 0, 0, 12]


async def test_instance_with_another_page_size_is_refused_by_name() -> None:
    odd = worker(page_size=32)
    async with staged(worker()) as stage, odd:
        stage.router.cluster.register(info_of(odd, name="odd"))

        def is_refused() -> bool:
            members = {member.info.instance_id: member for member in stage.router.cluster.members()}
            return members[InstanceId("odd")].state is State.DOWN

        await stage.until(is_refused)
        reason = (await stage.get("/readiness"))[1]["not_ready"]["odd"]
        assert "page size is 32" in reason
        async with stage.client.get(stage.url("/metrics")) as answer:
            assert 'memserve_router_instances{role="colocated",state="down"} 1.0' in await answer.text()
        odd.page_size = 16


async def test_cache_salts_and_extra_keys_separate_equal_prompts() -> None:
    async with staged(worker(), worker()) as stage:
        await followed(stage, 2)
        await generate(stage, ids(0))
        for name in ("cache_salt", "extra_key"):
            told = (await stage.post("/explain", {"input_ids": ids(0), name: "other"}))[1]
            assert {one["blocks"] for one in told["prefill_candidates"]} == {0}


@pytest.mark.parametrize(
    ("policy", "shares"), [("round_robin", [4, 4]), ("longest_prefix", [0, 8]), ("prompt_tree", [4, 4])]
)
async def test_policy_is_selected_by_flag(policy: str, shares: list[int]) -> None:
    """All prompts share their first page; nothing else."""

    workers = [worker() for _ in range(2)]
    async with staged(*workers, policy=policy) as stage:
        await followed(stage, 2)
        for number in range(8):
            await generate(stage, ids(0, 16) + ids(number + 1, 1000))
        assert sorted(len(one.requests) for one in workers) == shares


async def test_each_role_can_have_its_own_policy() -> None:
    decodes = [worker(Role.DECODE) for _ in range(2)]
    async with staged(pair()[0], *decodes, decode_policy="round_robin") as stage:
        told = (await stage.post("/explain", {"input_ids": ids(0)}))[1]
        assert told["policies"] == {"prefill": "prompt_tree", "decode": "round_robin"}
