"""Traces of requests across clients, router and servers: W3C's `traceparent`, and OpenTelemetry spans.

    client's span ── traceparent ──> request ┬─ queue      until admission
                                             ├─ place      until its instances are chosen
                                             ├─ fetch      of cached blocks, before dispatch
                                             ├─ prefill ── traceparent ──> the server's own spans
                                             └─ decode ─── traceparent ──> the server's own spans

Without --enable-trace, a client's `traceparent` is only passed on to the servers. A server adds its spans
with SGLang's own --enable-trace. Event loop thread only; a thread of the SDK sends the spans.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from memserve import __version__
from memserve.core.errors import ConfigError
from memserve.router.records import RequestRecord, RequestTrace
from memserve.scheduling.assignment import Assignment

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

SERVICE = "memserve-router"
PARENT, STATE = "traceparent", "tracestate"
_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class Propagated:
    """A client's trace that the router adds no spans to."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers

    def leg(self, instance: str, role: str) -> Mapping[str, str]:
        return self._headers

    def left(self, instance: str, *, is_answered: bool) -> None:
        pass

    def admitted(self) -> None:
        pass

    def placed(self, placed: Assignment) -> None:
        pass

    def end(self, ended: RequestRecord) -> None:
        pass


class PropagateOnly:
    """Passes clients' trace headers on. See `records.Traces`."""

    def begin(self, path: str, headers: Mapping[str, str]) -> RequestTrace | None:
        parent = headers.get(PARENT)
        if parent is None or not _PARENT.fullmatch(parent):
            return None
        state = headers.get(STATE)
        return Propagated({PARENT: parent} if state is None else {PARENT: parent, STATE: state})


class Tracing:
    """Makes spans. See `records.Traces`."""

    def __init__(self, provider: TracerProvider) -> None:
        """`provider` receives the spans; `close` shuts it down."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = provider
        self.tracer = provider.get_tracer("memserve.router", __version__)
        self.propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """Send spans to `endpoint`, OTLP over gRPC. Raises ConfigError if a package is missing."""
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(f"--enable-trace needs: pip install 'memserve[otel]' ({error})") from error
        provider = TracerProvider(resource=Resource.create({"service.name": SERVICE}))
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure="://" not in endpoint or None)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def begin(self, path: str, headers: Mapping[str, str]) -> RequestTrace:
        return SpannedRequest(self, path, headers)

    def close(self) -> None:
        """Send the queued spans and stop."""
        self.provider.shutdown()


class SpannedRequest:
    """The spans of one request. See `records.RequestTrace`."""

    def __init__(self, tracing: Tracing, path: str, headers: Mapping[str, str]) -> None:
        from opentelemetry import trace

        self._tracing = tracing
        self._trace = trace
        parents = {name: headers[name] for name in (PARENT, STATE) if name in headers}
        self._span = tracing.tracer.start_span(
            f"POST {path}",
            context=tracing.propagator.extract(parents),
            kind=trace.SpanKind.SERVER,
            attributes={"http.request.method": "POST", "url.path": path},
        )
        self._context = trace.set_span_in_context(self._span)
        self._since_ns = time.time_ns()
        self._clock_ns = self._since_ns - time.monotonic_ns()
        """Offset from the monotonic clock to Unix time."""
        self._legs: dict[str, list[Span]] = {}
        self._placed: Assignment | None = None
        self._placed_ns = 0

    def admitted(self) -> None:
        self._add_span("queue", self._since_ns, self._now_ns())

    def placed(self, placed: Assignment) -> None:
        self._add_fetch_span()
        self._placed, self._placed_ns = placed, time.time_ns()
        context, chosen = placed.decision.context, placed.decision.chosen
        attributes: dict[str, str | int | bool] = {
            "memserve.prefill": placed.prefill,
            "memserve.decode": placed.decode,
            "memserve.reason": placed.decision.reason,
            "memserve.prompt_tokens": placed.prompt.num_tokens,
            "memserve.expected_cached_tokens": context.cached_tokens(chosen.cached_blocks),
        }
        self._add_span("place", self._since_ns, self._now_ns(), attributes)

    def leg(self, instance: str, role: str) -> Mapping[str, str]:
        span = self._tracing.tracer.start_span(
            "generate" if role == "colocated" else role,
            context=self._context,
            kind=self._trace.SpanKind.CLIENT,
            attributes={"memserve.instance": instance, "memserve.role": role},
        )
        self._legs.setdefault(instance, []).append(span)
        headers: dict[str, str] = {}
        self._tracing.propagator.inject(headers, self._trace.set_span_in_context(span))
        return headers

    def left(self, instance: str, *, is_answered: bool) -> None:
        if spans := self._legs.get(instance):
            self._end_leg(spans.pop(0), is_answered)

    def end(self, ended: RequestRecord) -> None:
        self._add_fetch_span()
        for spans in self._legs.values():
            for span in spans:
                self._end_leg(span, False)
        told: dict[str, str | float | None] = {
            "http.response.status_code": ended.status,
            "memserve.rid": ended.rid,
            "memserve.request_id": ended.request_id,
            "memserve.attempts": ended.attempts,
            "memserve.first_token_s": ended.first_token_s,
            "memserve.cached_tokens": ended.cached_tokens,
        }
        self._span.set_attributes({name: value for name, value in told.items() if value is not None})
        if ended.status >= 500:
            self._span.set_status(self._trace.StatusCode.ERROR, ended.reason)
        self._span.end()

    def _add_fetch_span(self) -> None:
        """Add the fetch span of the last assignment, once the request was dispatched or placed again."""
        placed, self._placed = self._placed, None
        if placed is not None and placed.plan is not None and placed.fetched is not None:
            begun_ns = self._placed_ns
            told: dict[str, str | int | bool] = {
                "memserve.source": placed.plan.source,
                "memserve.blocks": placed.fetched.num_blocks,
            }
            self._add_span("fetch", begun_ns, begun_ns + int(placed.fetched.seconds * 1e9), told)

    def _add_span(
        self, name: str, begun_ns: int, ended_ns: int, told: Mapping[str, str | int | bool] | None = None
    ) -> None:
        span = self._tracing.tracer.start_span(
            name, context=self._context, start_time=begun_ns, attributes=told
        )
        span.end(ended_ns)
        self._since_ns = ended_ns

    def _end_leg(self, span: Span, is_answered: bool) -> None:
        if not is_answered:
            span.set_status(self._trace.StatusCode.ERROR, "failed, or given up")
        span.end()

    def _now_ns(self) -> int:
        return time.monotonic_ns() + self._clock_ns
