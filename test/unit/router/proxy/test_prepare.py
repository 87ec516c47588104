"""RequestPreparer: decides once what can be decided before an instance is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memserve.core.errors import BadRequest
from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.instance import ClusterSnapshot, Instance
from memserve.router.proxy.prepare import ClientContext, RequestPreparer
from memserve.router.request import Api
from memserve.router.server_info import ServerInfo
from memserve.router.tokenization.prompts import PromptReader
from memserve.router.tokenization.tokenizers import OFF, Tokenizers
from memserve.wire.messages import Role


class _Cluster:
    """A registry of a prefill and two decodes of one model."""

    def __init__(self, *max_prompt_tokens: int) -> None:
        decodes = [
            Instance(
                InstanceId(f"d{number}"),
                Epoch(1),
                Role.DECODE,
                f"http://d{number}:1",
                None,
                ServerInfo("m", "/m", page_size=4, vocab_size=100, max_prompt_tokens=most),
            )
            for number, most in enumerate(max_prompt_tokens)
        ]
        prefill = Instance(
            InstanceId("p"), Epoch(1), Role.PREFILL, "http://p:1", 1, ServerInfo("m", "/m", page_size=4)
        )
        self.snapshot = ClusterSnapshot.of([prefill, *decodes])

    def knows(self, model: str) -> bool:
        return model == "away"


def preparer(*max_prompt_tokens: int) -> RequestPreparer:
    return RequestPreparer(_Cluster(*max_prompt_tokens), PromptReader(Tokenizers(OFF)))  # type: ignore[arg-type]


async def test_prepared_request_has_keys_of_its_pages_and_the_model_that_serves_it() -> None:
    prepared = await preparer(64).prepare(Api.GENERATE, b'{"input_ids": [1, 2, 3, 4, 5]}', ClientContext())
    assert (prepared.model, prepared.prompt.num_tokens, prepared.num_tokens) == ("m", 5, None)
    assert [len(chain) for chain in prepared.prompt.chains] == [1]


async def test_long_prompt_is_eligible_only_for_decodes_that_hold_it() -> None:
    two = preparer(8, 64)
    body = b'{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9]}'
    prepared = await two.prepare(Api.GENERATE, body, ClientContext())
    assert prepared.num_tokens == 9
    snapshot = _Cluster(8, 64).snapshot
    assert [one.instance_id for one in prepared.eligible(snapshot).decodes] == ["d1"]
    assert [one.instance_id for one in prepared.resumed(65).eligible(snapshot).decodes] == []
    with pytest.raises(BadRequest, match="9 tokens"):
        await preparer(8, 8).prepare(Api.GENERATE, body, ClientContext())


async def test_tenants_get_different_salts_and_the_sole_tenant_none() -> None:
    body = b'{"input_ids": [1, 2, 3, 4], "cache_salt": "own"}'
    one = preparer(64)
    salts = [
        (await one.prepare(Api.GENERATE, body, ClientContext(tenant=tenant))).request.body["cache_salt"]
        for tenant in ("a", "b", "a", None)
    ]
    assert salts[0] == salts[2] != salts[1]
    assert salts[3] == "own"


async def test_body_tells_the_endpoint_if_none_is_given() -> None:
    one = preparer(64)
    for body, api in (
        (b'{"text": "hello"}', Api.GENERATE),
        (b'{"messages": [{"role": "user", "content": "hello"}]}', Api.CHAT),
        (b'{"prompt": "hello"}', Api.COMPLETIONS),
    ):
        assert (await one.prepare(None, body, ClientContext())).request.api is api


async def test_unknown_model_is_a_404_and_a_model_without_ready_servers_is_prepared() -> None:
    one = preparer(64)
    with pytest.raises(BadRequest) as error:
        await one.prepare(Api.CHAT, b'{"messages": [{"role": "user"}], "model": "x"}', ClientContext())
    assert (error.value.status, error.value.field) == (404, "model")
    body = b'{"messages": [{"role": "user", "content": "a"}], "model": "away"}'
    prepared = await one.prepare(Api.CHAT, body, ClientContext())
    assert prepared.model is None
    assert not prepared.eligible(_Cluster(64).snapshot).all()


async def test_top_logprobs_of_a_pair_are_those_that_prefill_can_hand_over() -> None:
    body = b'{"text": "x", "return_logprob": true, "top_logprobs_num": %d}'
    one = preparer(64)
    one._cluster.snapshot = ClusterSnapshot.of(  # type: ignore[misc]
        replace(each, server_info=replace(each.server_info, vocab_size=1000))
        for each in one._cluster.snapshot.all()
    )
    await one.prepare(Api.GENERATE, body % 128, ClientContext())
    with pytest.raises(BadRequest, match="at most 128"):
        await one.prepare(Api.GENERATE, body % 129, ClientContext())
