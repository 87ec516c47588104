"""Several models behind one router: requests go to servers of their model; caches are kept per model."""

from __future__ import annotations

from typing import Any

from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import Stage, info_of, staged

IDS = list(range(512))


def worker(model: str, role: Role = Role.COLOCATED) -> FakeWorker:
    return FakeWorker(
        role, model=model, model_path=f"/nowhere/{model}", cache_tokens=1 << 16, context_tokens=4096
    )


async def ask(stage: Stage, model: str | None, path: str = "/generate") -> tuple[int, Any]:
    body: dict[str, Any] = {"input_ids": IDS}
    if path == "/v1/completions":
        body = {"prompt": IDS, "max_tokens": 2}
    return await stage.post(path, body if model is None else {**body, "model": model})


async def followed(stage: Stage, count: int) -> None:
    await stage.until(lambda: len(stage.router.state.subscriptions.stats()) == count)


async def test_request_goes_to_a_server_of_its_model() -> None:
    one, other = worker("one"), worker("other")
    pair = worker("pair", Role.PREFILL), worker("pair", Role.DECODE)
    workers = (one, other, *pair)
    async with staged(*workers) as stage:
        for model, served in (("one", (one,)), ("other", (other,)), ("pair", pair), ("one:lora", (one,))):
            before = [len(each.requests) for each in workers]
            status, answer = await ask(stage, model, "/v1/completions")
            assert status == 200, answer
            assert [len(each.requests) - num for each, num in zip(workers, before, strict=True)] == [
                int(each in served) for each in workers
            ]
        listed = (await stage.get("/v1/models"))[1]["data"]
        assert sorted(card["id"] for card in listed) == ["one", "other", "pair"]
        assert (await stage.get("/v1/models/other"))[1]["id"] == "other"
        assert (await stage.get("/v1/models/nothing"))[0] == 404
        status, answer = await ask(stage, "nothing", "/v1/completions")
        assert (status, answer["error"]["param"]) == (404, "model")
        # SGLang's native API has no such field; one router may have several models all the same.
        assert (await ask(stage, "other"))[0] == 200
        assert len(other.requests) == 2
        assert (await ask(stage, "nothing"))[0] == 404


async def test_cached_blocks_count_for_their_own_model_only() -> None:
    """Blocks of both models have equal keys where their tokens are equal."""

    one, other = worker("one"), worker("other")
    async with staged(one, other) as stage:
        await followed(stage, 2)
        assert (await ask(stage, "one"))[0] == 200

        async def cached(model: str) -> list[tuple[str, int]]:
            body = {"input_ids": IDS, "model": model}
            decision = (await stage.post("/explain", body))[1]
            return [(each["instance"], each["blocks"]) for each in decision["prefill_candidates"]]

        assert await cached("one") == [(info_of(one).instance_id, 32)]
        assert await cached("other") == [(info_of(other).instance_id, 0)]
        await ask(stage, "other")
        await ask(stage, "other")
        costs = stage.router.state.scheduler.costs
        observed = {model: of_model.prefills.num_observed for model, of_model in costs.items()}
        assert observed["one"] <= 1
        assert set(observed) == {"one", "other"}


async def test_model_whose_servers_are_away_is_a_503_not_a_404() -> None:
    one, other = worker("one"), worker("other")
    async with staged(one, other) as stage:
        cluster = stage.router.cluster
        member = cluster.find(str(info_of(other).instance_id))
        assert member is not None
        cluster.drain(member)
        status, answer = await ask(stage, "other")
        assert (status, answer["error"]["type"]) == (503, "service_unavailable")
        assert (await ask(stage, "one"))[0] == 200
        assert (await ask(stage, "nothing"))[0] == 404
        cluster.undrain(member)
        assert (await ask(stage, "other"))[0] == 200
