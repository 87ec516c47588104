"""A router on another thread, in front of workers with the small model's tokenizer, and its log."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from tokenizers import Tokenizer

from memserve.router.field_kinds import ModelLimits
from memserve.router.proxy.validation import read_request
from memserve.router.request import Api
from memserve.router.tokenization.token_probes import Agreement
from memserve.router.tokenization.token_records import KnownTokens
from memserve.router.tokenization.tokenizer import Tokenizer as TextReader
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker, ReceivedRequest
from memserve.wire.messages import Role

from .harness import Stage, staged

T = TypeVar("T")

TIMEOUT_S = 20.0


class Reader(FakeWorker):
    """Reads texts as the model does, and refuses what its answers have no shape for, as a server would."""

    tokenizer: Tokenizer
    reader: TextReader

    async def _answer(self, request: web.Request, received: ReceivedRequest) -> web.StreamResponse:
        try:
            return await super()._answer(request, received)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            return web.json_response({"error": {"message": repr(error)}}, status=400)
        finally:
            self.requests.clear()
            self.aborts.clear()

    def _refusal(self, received: ReceivedRequest, script: Script) -> web.Response | None:
        return None  # it would take another endpoint's fields for this one's

    async def _abort(self, request: web.Request) -> web.Response:
        try:
            return await super()._abort(request)
        except (KeyError, TypeError, ValueError) as error:
            return web.json_response({"error": {"message": repr(error)}}, status=400)

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "messages" in body:
            tokens = await self.reader.tokens_of(read_request(Api.CHAT, body, ModelLimits(), "none"))
            assert isinstance(tokens, KnownTokens)
            ids: Any = list(tokens.prompts[0])
        elif isinstance(body["prompt"], list):
            ids = [self.tokenizer.encode(text).ids for text in body["prompt"]]
        else:
            ids = self.tokenizer.encode(body["prompt"]).ids
        return web.json_response({"tokens": ids, "count": len(ids)})


class Beside:
    """A stage on a loop of its own."""

    def __init__(self, stage: Stage, loop: asyncio.AbstractEventLoop, failures: list[str]) -> None:
        self.stage = stage
        self.failures = failures
        """What was logged that should not have been."""
        self._loop = loop

    @property
    def port(self) -> int:
        return int(self.stage.router.url.rsplit(":", 1)[1])

    def assert_well(self) -> None:
        """Nothing has been logged that should not have been."""
        failures, self.failures[:] = list(self.failures), []
        assert failures == []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives, on the router's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(TIMEOUT_S)


class _Failures(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(logging.Formatter().format(record))


@contextmanager
def beside(
    model: Path, roles: Sequence[Role] = (Role.PREFILL, Role.DECODE), **settings: Any
) -> Iterator[Beside]:
    """A router with a worker of each role, until the block is left."""
    reader = TextReader.load(model)
    reader.agreements.note("this one", Agreement(texts=True, chats=True))
    workers = [Reader(role, model="tiny", model_path=str(model), context_tokens=512) for role in roles]
    for worker in workers:
        worker.reader, worker.tokenizer = reader, Tokenizer.from_file(str(model / "tokenizer.json"))
    loop, failures = asyncio.new_event_loop(), _Failures()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    logging.getLogger().addHandler(failures)
    context = staged(*workers, heartbeat_secs=3600.0, **settings)  # they send none
    try:
        stage = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(TIMEOUT_S)
        yield Beside(stage, loop, failures.said)
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(TIMEOUT_S)
    finally:
        logging.getLogger().removeHandler(failures)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(TIMEOUT_S)
        reader.close()
