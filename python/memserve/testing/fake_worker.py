"""A server with SGLang's HTTP API that computes nothing: scripted tokens, failures on demand.

Runs on the caller's event loop. Records each request and its outcome. The test controls the timing: a gate
delays a token until its event is set.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from memserve.testing.fake_answers import Answers, Script, num_parts
from memserve.wire.messages import Role

Json = dict[str, Any]

WAIT_S = 5.0
RESERVED_TOKENS = 512


@dataclass(slots=True)
class ReceivedRequest:
    """One generation request that a fake worker received."""

    path: str
    body: Json
    headers: Mapping[str, str]
    num_sent: int = 0
    """Tokens written so far; in a stream, each token is an event."""
    finished: bool = False
    dropped: bool = False
    """The connection was closed before the answer was complete."""

    @property
    def rids(self) -> list[str]:
        """The request ids of the parts, as SGLang names them."""
        rid = self.body.get("rid")
        return rid if isinstance(rid, list) else [str(rid)]


@dataclass(slots=True)
class FakeWorker:
    """Serves as `role` inside an `async with` block. A change of `script` applies to later requests."""

    role: Role = Role.COLOCATED
    script: Script = field(default_factory=Script)
    model: str = "fake-model"
    model_path: str = "/nowhere/fake-model"
    context_tokens: int = 1024
    page_size: int = 16
    cache_tokens: int | None = None
    """Capacity of its radix cache in tokens, as it reports it; None: no cache."""
    port: int = 0
    """0: the system picks a port, which a restart keeps."""
    bootstrap_port: int = 8998
    healthy: bool = True
    is_mortal: bool = False
    """Ends as on SIGKILL when its script drops a connection."""
    num_special_tokens: int = 0
    """Number of special tokens, such as BOS, before every text."""
    tls: ssl.SSLContext | None = None
    """TLS context; None: plain HTTP."""
    server_info: Json = field(default_factory=dict)
    """Additional fields of its `/server_info`."""
    requests: list[ReceivedRequest] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    num_flushes: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _runner: web.AppRunner | None = None
    _death: asyncio.Task[None] | None = None
    _transports: set[asyncio.BaseTransport] = field(default_factory=set)

    @property
    def url(self) -> str:
        """Base URL."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> FakeWorker:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Start to serve; after `kill`, on the same port."""
        app = web.Application(client_max_size=1 << 30)
        app.add_routes(
            [
                web.post("/generate", self._generate),
                web.post("/v1/chat/completions", self._generate),
                web.post("/v1/completions", self._generate),
                web.post("/v1/embeddings", self._generate),
                web.post("/abort_request", self._abort),
                web.get("/health", self._health),
                web.get("/model_info", self._model_info),
                web.get("/server_info", self._server_info),
                web.get("/v1/loads", self._loads),
                web.get("/v1/models", self._models),
                web.post("/v1/tokenize", self._tokenize),
                web.post("/flush_cache", self._flush),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self.tls).start()
        self.port = self._runner.addresses[0][1]

    async def kill(self) -> None:
        """Stop as on SIGKILL: every connection is reset, the port is free. Idempotent."""
        for transport in list(self._transports):
            if isinstance(transport, asyncio.Transport):
                transport.abort()
        self._transports.clear()
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def until(self, condition: Callable[[FakeWorker], object], timeout_s: float = WAIT_S) -> None:
        """Wait until `condition` holds for this worker. Raises TimeoutError after the timeout."""
        async with asyncio.timeout(timeout_s):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        received = ReceivedRequest(request.path, await request.json(), dict(request.headers))
        if request.transport is not None:
            self._transports.add(request.transport)
        self.requests.append(received)
        self._changed.set()
        try:
            response = await self._answer(request, received)
            received.finished = True
            return response
        finally:
            received.dropped = not received.finished
            self._changed.set()

    async def _answer(self, request: web.Request, received: ReceivedRequest) -> web.StreamResponse:
        script = self.script
        refused = self._refusal(received, script)
        if refused is not None:
            return refused
        if received.path == "/v1/embeddings":
            await self._reach(request, script, 0)
            return web.json_response({"object": "list", "data": [{"index": 0, "embedding": [0.5, -0.5]}]})
        answers = Answers(received.path, received.body, script, self.role)
        if received.body.get("stream"):
            return await self._stream(request, received, answers, script)
        for number in range(answers.num_tokens):
            await self._reach(request, script, number)
            received.num_sent += 1
        return web.json_response(answers.whole())

    async def _stream(
        self, request: web.Request, received: ReceivedRequest, answers: Answers, script: Script
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(answers.num_tokens):
            await self._reach(request, script, number)
            for event in answers.events(number):
                await response.write(event)
            received.num_sent += 1
            self._changed.set()
        await self._reach(request, script, answers.num_tokens)
        await response.write(answers.end())
        return response

    def _refusal(self, received: ReceivedRequest, script: Script) -> web.Response | None:
        """The error answer of the script or of SGLang's checks; None if the request is accepted."""
        if script.status != 200:
            return web.json_response({"error": {"message": script.message}}, status=script.status)
        params = received.body.get("sampling_params") or received.body
        first = params[0] if isinstance(params, list) else params
        if self.role is not Role.COLOCATED:
            rooms = received.body.get("bootstrap_room")
            if (first.get("n") or 1) > 1:
                return web.json_response({"error": {"message": "n > 1 hangs here"}}, status=500)
            if (len(rooms) if isinstance(rooms, list) else rooms and None) != num_parts(received.body):
                return web.json_response({"error": {"message": "wrong bootstrap_room"}}, status=500)
        return None

    async def _reach(self, request: web.Request, script: Script, number: int) -> None:
        """Wait for the gate of token `number`, or drop the connection if the script says so."""
        if number in script.gates:
            await script.gates[number].wait()
        if script.drop_before == number:
            if self.is_mortal:
                self._death = asyncio.create_task(self.kill())
            if isinstance(request.transport, asyncio.Transport):
                request.transport.abort()
            raise asyncio.CancelledError

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborts.append((await request.json())["rid"])
        self._changed.set()
        return web.Response()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _model_info(self, _: web.Request) -> web.Response:
        return web.json_response({"model_path": self.model_path, "served_model_name": self.model})

    async def _server_info(self, _: web.Request) -> web.Response:
        mode = "null" if self.role is Role.COLOCATED else str(self.role)
        info = {"disaggregation_mode": mode, "page_size": self.page_size, "version": "fake"}
        if self.cache_tokens is not None:
            info |= {"disable_radix_cache": False, "max_total_num_tokens": self.cache_tokens}
            info["num_reserved_decode_tokens"] = RESERVED_TOKENS
        return web.json_response(info | self.server_info)

    async def _loads(self, _: web.Request) -> web.Response:
        load = {"dp_rank": 0, "num_running_reqs": 1, "num_waiting_reqs": 2, "num_used_tokens": 3}
        return web.json_response({"loads": [load]})

    async def _models(self, _: web.Request) -> web.Response:
        card = {"id": self.model, "object": "model", "max_model_len": self.context_tokens}
        return web.json_response({"object": "list", "data": [card]})

    async def _tokenize(self, _: web.Request) -> web.Response:
        return web.json_response({"tokens": [0] * self.num_special_tokens, "count": self.num_special_tokens})

    async def _flush(self, _: web.Request) -> web.Response:
        self.num_flushes += 1
        return web.Response(text="Cache flushed.\n")
