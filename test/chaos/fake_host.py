"""A process with fake workers whose answers depend on their prompts, as a greedy model's do.

    python fake_host.py NAME MODEL CONTROL PORT[:SHOWN_PORT],...

Half of the workers are prefills. Each registers itself at the router's control address. For port 0 the
system picks one; SHOWN_PORT is the port that the router uses. Answers requests of its parent over stdin.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

from aiohttp import web
from tokenizers import Tokenizer

from memserve.core.ids import InstanceId, new_epoch
from memserve.instance.registrar import Registrar
from memserve.router.field_kinds import ModelLimits
from memserve.router.proxy.validation import read_request
from memserve.router.request import Api
from memserve.router.tokenization.token_probes import Agreement
from memserve.router.tokenization.token_records import KnownTokens
from memserve.router.tokenization.tokenizer import Tokenizer as TextReader
from memserve.testing.fake_answers import Answers, Script
from memserve.testing.fake_worker import FakeWorker, ReceivedRequest
from memserve.testing.transport_process import serve
from memserve.wire.link import ControlClient
from memserve.wire.messages import InstanceInfo, Role

Json = dict[str, Any]

TOKEN_S = 0.008
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,;:!?"


class FakeModel:
    """The next token is a hash of all tokens before it, so an answer that is resumed continues equally."""

    def __init__(self, directory: Path) -> None:
        self._reader = TextReader.load(directory)
        self._reader.agreements.note("this one", Agreement(texts=True, chats=True))
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._letters = self.encode(LETTERS)

    def encode(self, text: str) -> list[int]:
        """Tokenize as the model's tokenizer."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    async def encode_chat(self, body: Json) -> list[int]:
        """Render as the model's chat template."""
        tokens = await self._reader.tokens_of(read_request(Api.CHAT, body, ModelLimits(), "none"))
        if not isinstance(tokens, KnownTokens):
            raise ValueError(tokens.reason)
        return list(tokens.prompts[0])

    def go_on(self, ids: list[int], count: int) -> list[int]:
        """The `count` tokens after `ids`."""
        seen, new = zlib.crc32(b"".join(one.to_bytes(4, "big") for one in ids)), list[int]()
        for _ in range(count):
            new.append(self._letters[seen % len(self._letters)])
            seen = zlib.crc32(new[-1].to_bytes(4, "big"), seen)
        return new

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`."""
        text: str = self._tokenizer.decode(ids)
        return text


class _Answers(Answers):
    """Answers that depend on their prompts."""

    def __init__(self, path: str, body: Json, role: Role, tokens: list[list[int]], model: FakeModel) -> None:
        self._ids = [part[:1] for part in tokens] if role is Role.PREFILL else tokens
        pieces = tuple(model.decode([one]) for one in tokens[0])
        super().__init__(path, body, Script(tokens=pieces), role)
        self._model = model

    def _native(self, part: int, num_tokens: int) -> Json:
        ids = self._ids[part][:num_tokens]
        said = super()._native(part, num_tokens)
        return {**said, "text": self._model.decode(ids), "output_ids": ids}


class ChaosWorker(FakeWorker):
    """A fake worker that misbehaves on request."""

    fake_model: FakeModel
    how = "well"
    num_open = 0

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self.requests.clear()
        self.aborts.clear()
        self.num_open += 1
        try:
            return await super()._generate(request)
        finally:
            self.num_open -= 1

    async def _answer(self, request: web.Request, received: ReceivedRequest) -> web.StreamResponse:
        how = self.how
        if how == "never":
            await asyncio.sleep(3600)
        if how == "500":
            return web.json_response({"error": {"message": "something is wrong here"}}, status=500)
        if how == "resets":
            request.transport.abort()  # type: ignore[union-attr]
            raise asyncio.CancelledError
        if how == "garbage":
            return web.Response(body=random.Random(len(received.body)).randbytes(200))
        answers = await self._answers(received)
        if how == "half":
            return await self._half(request, received, answers)
        if received.body.get("stream"):
            response = await self._tokens(request, answers)
        else:
            await asyncio.sleep(TOKEN_S * answers.num_tokens)
            response = web.json_response(answers.whole())
        if how == "closes" and request.transport is not None:
            # It said nothing of closing: the router's next request may be on its way already.
            asyncio.get_running_loop().call_later(random.random() * 0.02, request.transport.close)
        return response

    async def _answers(self, received: ReceivedRequest) -> _Answers:
        body = received.body
        given = body.get("input_ids") or body.get("prompt") or body.get("text")
        if given is None:
            given = await self.fake_model.encode_chat(body)
        is_batch = isinstance(given, list) and isinstance(given[0], list | str)
        prompts = given if is_batch else [given]
        ids = [self.fake_model.encode(one) if isinstance(one, str) else one for one in prompts]
        params = body.get("sampling_params") or {}
        count = (
            params.get("max_new_tokens") or body.get("max_tokens") or body.get("max_completion_tokens") or 16
        )
        tokens = [self.fake_model.go_on(one, count) for one in ids]
        return _Answers(received.path, body, self.role, tokens, self.fake_model)

    async def _tokens(self, request: web.Request, answers: _Answers) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(answers.num_tokens):
            await asyncio.sleep(TOKEN_S)
            for event in answers.events(number):
                await response.write(event)
        await response.write(answers.end())
        return response

    async def _half(
        self, request: web.Request, received: ReceivedRequest, answers: _Answers
    ) -> web.StreamResponse:
        """Close the connection properly, in the middle of an answer."""
        said = (
            b"".join(answers.events(0))
            if received.body.get("stream")
            else json.dumps(answers.whole()).encode()
        )
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(said[: len(said) // 2])
        return response

    async def _server_info(self, request: web.Request) -> web.Response:
        mode = "null" if self.role is Role.COLOCATED else str(self.role)
        return web.json_response(
            {"disaggregation_mode": mode, "page_size": self.page_size, "version": "fake"}
        )

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        model = self.fake_model
        if "messages" in body:
            ids: Any = await model.encode_chat(body)
        elif isinstance(body["prompt"], list):
            ids = [model.encode(text) for text in body["prompt"]]
        else:
            ids = model.encode(body["prompt"])
        return web.json_response({"tokens": ids, "count": len(ids)})


class Host:
    """The workers, on an event loop of their own."""

    def __init__(self, name: str, model: str, control: str, ports: str) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        fake_model = FakeModel(Path(model))
        self._workers: dict[str, ChaosWorker] = {}
        shown: dict[str, int] = {}
        for number, port in enumerate(ports.split(",")):
            role = Role.DECODE if number % 2 else Role.PREFILL
            own, _, told = port.partition(":")
            worker = ChaosWorker(role, model="tiny", model_path=model, context_tokens=8192, port=int(own))
            worker.fake_model = fake_model
            asyncio.run_coroutine_threadsafe(worker.start(), self._loop).result()
            instance = f"{name}-{role}-{number // 2}"
            self._workers[instance] = worker
            shown[instance] = int(told or worker.port)
        self.greeting = {instance: worker.port for instance, worker in self._workers.items()}
        for instance, worker in self._workers.items():
            self._register(instance, worker, control, shown[instance])

    def behave(self, how: str) -> None:
        """Set the misbehaviour, from the next request on."""
        for worker in self._workers.values():
            worker.how = how

    def num_open(self) -> int:
        """Requests that the workers have not ended."""
        return sum(worker.num_open for worker in self._workers.values())

    def _register(self, instance: str, worker: ChaosWorker, control: str, port: int) -> None:
        bootstrap = 8998 if worker.role is Role.PREFILL else None
        url = f"http://127.0.0.1:{port}"
        info = InstanceInfo(InstanceId(instance), new_epoch(), worker.role, url, bootstrap)
        Registrar(ControlClient(control), info).start()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    host = Host(*sys.argv[1:])
    serve(host.greeting, {"behave": host.behave, "num_open": host.num_open})
