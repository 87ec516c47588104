"""Tracing: a client's trace continues through the router to both servers, with a span per part."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from memserve.core.errors import ConfigError
from memserve.router.observability.tracing import PropagateOnly, Tracing
from memserve.router.request import Api
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import Stage, pair, staged

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, ReadableSpan]]:
    """What was sent, by name."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(Tracing, "to", classmethod(lambda cls, _: cls(provider)))
    return lambda: {span.name: span for span in exporter.get_finished_spans()}


def hex_of(number: int, digits: int = 16) -> str:
    return format(number, f"0{digits}x")


def parent_of(span: ReadableSpan) -> str:
    assert span.parent is not None
    return hex_of(span.parent.span_id)


def id_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return hex_of(span.context.span_id)


def header_of(worker: FakeWorker, name: str = "traceparent") -> str | None:
    headers = {key.lower(): value for key, value in worker.requests[-1].headers.items()}
    return headers.get(name)


async def ask(stage: Stage, stream: bool = False, **body: Any) -> None:
    body = {"input_ids": list(range(64)), "stream": stream, **body}
    async with stage.client.post(stage.url("/generate"), json=body, headers=HEADERS) as response:
        await response.read()


@pytest.mark.parametrize("stream", [True, False])
async def test_trace_spans_client_router_and_servers(spans: Any, stream: bool) -> None:
    async with staged(*pair(), enable_trace=True) as stage:
        await ask(stage, stream)
        workers = {"prefill": stage.prefill, "decode": stage.decode}
        seen = {role: header_of(worker) for role, worker in workers.items()}
        names = {role: f"{role}-{worker.port}" for role, worker in workers.items()}
    found = spans()
    assert found.keys() == {"POST /generate", "queue", "place", "prefill", "decode"}
    request = found.pop("POST /generate")
    assert parent_of(request) == PARENT
    for name, span in found.items():
        assert span.context is not None
        assert hex_of(span.context.trace_id, 32) == TRACE
        assert parent_of(span) == id_of(request), name
        assert request.start_time <= span.start_time + 10**6
        assert span.end_time <= request.end_time + 10**6
    for role in ("prefill", "decode"):
        assert seen[role] == f"00-{TRACE}-{id_of(found[role])}-01"
        assert found[role].attributes["memserve.instance"] == names[role]
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["memserve.attempts"] == 1
    assert found["place"].attributes["memserve.decode"] == names["decode"]
    assert found["place"].attributes["memserve.prompt_tokens"] == 64
    assert request.status.is_ok or request.status.is_unset


async def test_trace_marks_the_failed_leg(spans: Any) -> None:
    async with staged(*pair(), enable_trace=True, retry_max_retries=0) as stage:
        stage.prefill.script = Script(gates={0: asyncio.Event()})
        stage.decode.script = Script(status=500, message="broken")
        await ask(stage)
    found = spans()
    assert not found["POST /generate"].status.is_ok
    assert "broken" in found["POST /generate"].status.description
    assert found["POST /generate"].attributes["http.response.status_code"] == 502
    assert {found[leg].status.description for leg in ("prefill", "decode")} == {"failed, or given up"}


async def test_trace_has_a_span_per_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(Tracing, "to", classmethod(lambda cls, _: cls(provider)))
    workers = [FakeWorker(), FakeWorker()]
    async with staged(*workers, enable_trace=True, retry_initial_backoff_ms=1) as stage:
        workers[0].script = workers[1].script = Script(status=500)
        await ask(stage)
    names = [span.name for span in exporter.get_finished_spans()]
    assert names.count("generate") == names.count("place") == 4
    assert names.count("POST /generate") == 1


async def test_trace_has_a_span_for_a_refused_request(spans: Any) -> None:
    async with staged(*pair(), enable_trace=True) as stage:
        await ask(stage, text=5)
    request = spans()["POST /generate"]
    assert request.attributes["http.response.status_code"] == 400
    assert request.attributes["memserve.rid"] == "-"


async def test_trace_contains_no_prompt(spans: Any) -> None:
    async with staged(*pair(), enable_trace=True) as stage:
        await stage.post("/generate", {"text": "a secret plan", "sampling_params": {"regex": "secret"}})
    assert all("secret" not in span.to_json() for span in spans().values())


@pytest.mark.parametrize("role", [Role.PREFILL, Role.COLOCATED])
async def test_propagate_only_passes_the_traceparent_on(role: Role) -> None:
    workers = pair() if role is Role.PREFILL else (FakeWorker(),)
    async with staged(*workers) as stage:
        await ask(stage)
        for worker in workers:
            assert header_of(worker) == HEADERS["traceparent"]
            assert header_of(worker, "tracestate") == "vendor=1"
        await stage.post("/generate", {"text": "untraced"})
        assert all(header_of(worker) is None for worker in workers)


@pytest.mark.parametrize(
    "parent", ["", "x", f"00-{TRACE}-{PARENT}", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "é"]
)
def test_propagate_only_drops_an_invalid_traceparent(parent: str) -> None:
    assert PropagateOnly().begin(Api.GENERATE, {"traceparent": parent}) is None


def test_tracing_without_its_packages_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=re.escape("memserve[otel]")):
        Tracing.to("localhost:4317")


def test_router_without_tracing_does_not_import_opentelemetry() -> None:
    import subprocess
    import sys

    code = "import memserve.router.app, sys; print([m for m in sys.modules if m.startswith('opentel')])"
    told = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60)
    assert told.strip() == "[]"
