"""The names of requests at servers, and their names in answers."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.instance import Instance
from memserve.router.field_kinds import ModelLimits
from memserve.router.proxy.n_sampling import as_batch, as_singles
from memserve.router.proxy.names import renamed, told_name, told_names, with_told_names
from memserve.router.proxy.recovery import ResumableStream
from memserve.router.proxy.validation import read_request
from memserve.router.request import Api, GenerationRequest, RequestIds
from memserve.router.server_info import ServerInfo
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import pair, staged

WORKER = Instance(InstanceId("a"), Epoch(1), Role.COLOCATED, "http://a:1", None, ServerInfo("m", "/m"))
IDS = RequestIds()
BODIES: list[dict[str, Any]] = [
    {"text": "a"},
    {"text": "a", "rid": "x"},
    {"text": ["a"] * 12},
    {"text": ["a"] * 12, "rid": "x"},
    {"text": ["a"] * 12, "rid": [f"x{n}" for n in range(12)]},
    {"text": ["a"] * 12, "rid": "x", "sampling_params": {"n": 2}},
    {"text": "a", "rid": "x", "sampling_params": {"n": 12}},
]


def read(body: dict[str, Any]) -> GenerationRequest:
    request = read_request(Api.GENERATE, body, ModelLimits(), IDS.new())
    return renamed(request) if request.has_client_rid else request


def test_no_name_at_a_server_is_a_prefix_of_another() -> None:
    names = list[str]()
    for body in BODIES * 2:
        request = read(body)
        for attempt in (request, renamed(request), renamed(renamed(request))):
            names += as_batch(attempt).rids if request.num_samples > 1 else attempt.rids
    chat = read_request(
        Api.COMPLETIONS, {"prompt": ["a"] * 12, "rid": "x", "n": 12}, ModelLimits(), IDS.new()
    )
    names += [name for single in as_singles(renamed(chat)) for name in single.rids]
    assert len(set(names)) == len(names)
    ordered = sorted(names)
    assert not any(b.startswith(a) for a, b in itertools.pairwise(ordered))


@pytest.mark.parametrize("body", BODIES)
def test_answers_keep_their_names_over_all_attempts(body: dict[str, Any]) -> None:
    first = read(body)
    for attempt in (renamed(first), renamed(renamed(first))):
        assert told_names(attempt) == told_names(first)
        assert told_name(attempt, attempt.rid) == told_name(first, first.rid)
    given = body.get("rid")
    if given is not None:
        parts = [f"{given}_{n}" for n in range(12)] if isinstance(given, str) else given
        assert told_names(first) == set(parts if isinstance(body["text"], list) else [given])


@given(st.text(min_size=1), st.text())
def test_an_answer_shows_the_clients_name_whatever_it_is(rid: str, text: str) -> None:
    attempt = renamed(read_request(Api.GENERATE, {"text": "a", "rid": rid}, ModelLimits(), "new"))
    answer = json.dumps({"text": text, "meta_info": {"id": attempt.rid}}).encode()
    assert json.loads(with_told_names(attempt.mark, answer)) == {"text": text, "meta_info": {"id": rid}}


async def test_names_of_a_stream_are_the_clients_wherever_chunks_end() -> None:
    written = list[bytes]()

    class Client:
        has_begun = False

        async def write(self, chunk: bytes) -> None:
            written.append(chunk)

    request = read({"text": "a", "rid": "me"})
    stream = b'data: {"id":"%s"}\n\ndata: [DONE]\n\n' % request.rid.encode()
    write = ResumableStream(Client(), None).writer(request, WORKER, None)
    for i in range(len(stream)):
        await write(stream[i : i + 1])
    assert b"".join(written) == b'data: {"id":"me"}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_pair", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
    ],
)
async def test_servers_never_see_a_clients_rid_as_a_name(
    path: str, body: dict[str, Any], is_pair: bool, stream: bool
) -> None:
    async with staged(*(pair() if is_pair else [FakeWorker()])) as stage:
        for rid in ({}, {"rid": "job-1"}):
            async with stage.client.post(stage.url(path), json={**body, **rid, "stream": stream}) as response:
                answer = await response.text()
            for worker in (one for all_ in stage.workers.values() for one in all_):
                name = worker.requests[-1].rids[0]
                assert name != "job-1"
                assert (name in answer) is not bool(rid)
            assert ('"job-1"' in answer) is bool(rid)


@pytest.mark.parametrize("rid", [{}, {"rid": "job-1"}])
@pytest.mark.parametrize("is_pair", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 3}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}),
    ],
)
async def test_all_events_of_an_openai_stream_have_one_id(
    path: str, body: dict[str, Any], is_pair: bool, rid: dict[str, str]
) -> None:
    async with staged(*(pair() if is_pair else [FakeWorker()])) as stage:
        async with stage.client.post(stage.url(path), json={**body, **rid, "stream": True}) as response:
            events = (await response.read()).split(b"\n\n")
        ids = {json.loads(event[6:])["id"] for event in events if event.startswith(b"data: {")}
        assert len(ids) == 1
        assert not rid or ids == {"job-1"}
