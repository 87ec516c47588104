"""No key is ever logged, answered or shown, whatever fails."""

from __future__ import annotations

import base64
import logging
import signal
from pathlib import Path

import pytest

from memserve.core.errors import ConfigError
from memserve.router.app import running_router
from memserve.router.auth.keys import Keys
from memserve.router.cluster.discovery.static import static_server
from memserve.router.config import RouterConfig
from memserve.router.request import Api, GenerationRequest
from memserve.testing.fake_answers import Script
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import Stage, pair, staged
from ..test_launch import launched

MARK = "s3cret"
"""Part of every key of these tests, valid or not, and of prompts, which logs must not show either."""
BODY = {"text": f"prompt {MARK}", "sampling_params": {"max_new_tokens": 2}}


def secret(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


async def everything(stage: Stage, authorization: str | None) -> list[str]:
    """The answers to requests of all kinds with this Authorization header."""
    headers = {} if authorization is None else {"Authorization": authorization}
    bodies: list[object] = [
        BODY,
        {**BODY, "stream": True},
        {"text": 1},
        {"input_ids": ["x"]},
        {**BODY, "sampling_params": "x"},
        [],
        {**BODY, "cache_salt": 5},
    ]
    paths = ["/generate", "/v1/completions", "/v1/chat/completions", "/explain", "/workers", "/abort_request"]
    answers = []
    for path in paths:
        for body in bodies:
            async with stage.client.post(stage.url(path), json=body, headers=headers) as response:
                answers.append(await response.text() + str(response.headers))
    pages = [
        "/workers",
        "/tree",
        "/v1/models",
        "/server_info",
        "/readiness",
        "/metrics",
        "/flush_cache",
        "/x",
    ]
    for path in [*pages, "/ui", "/ui/state", "/requests"]:
        async with stage.client.get(stage.url(f"/{path}"), headers=headers) as response:
            answers.append(await response.text() + str(response.headers))
    return answers


@pytest.mark.parametrize("is_pair", [False, True])
async def test_no_log_line_and_no_answer_contains_a_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_pair: bool
) -> None:
    caplog.set_level(logging.DEBUG)

    keys = secret(tmp_path / "keys", f"{MARK}-a alice rps=1000\n{MARK}-b bob\n")
    admins = secret(tmp_path / "admins", f"{MARK}-root ops\n")
    cluster = secret(tmp_path / "cluster", f"{MARK}-cluster-key-of-32-bytes")
    info = {"api_key": f"{MARK}-own", "nested": [{"admin_api_key": f"{MARK}-own"}]}
    workers = pair() if is_pair else (FakeWorker(server_info=info),)
    settings = {
        "api_keys_file": keys,
        "admin_api_key_file": admins,
        "api_key": f"{MARK}-servers",
        "cluster_key_file": cluster,
        "retry_initial_backoff_ms": 1,
        "retry_max_retries": 1,
    }
    async with staged(*workers, **settings) as stage:
        password = base64.b64encode(f"me:{MARK}-a".encode()).decode()
        asking = [None, f"Bearer {MARK}-a", f"Bearer {MARK}-no", f"Basic {password}", f"{MARK} {MARK}"]
        answers = []
        for authorization in [*asking, f"Bearer {MARK}-root"]:
            answers += await everything(stage, authorization)
        for script in (
            Script(status=401, message="no key"),
            Script(status=500, message="broken"),
            Script(drop_before=1),
        ):
            for worker in workers:
                worker.script = script
            answers += await everything(stage, f"Bearer {MARK}-a")
        for text in (f"{MARK}-a", f"{MARK}-a alice {MARK}=1", f"{MARK}-a alice rps={MARK}", ""):
            secret(keys, text)
            secret(admins, f"{MARK} {MARK} {MARK}")
            stage.router.ingress.reload()
        for worker in workers:
            await worker.kill()
        answers += await everything(stage, f"Bearer {MARK}-a")
        assert f"Bearer {MARK}-servers" in {one.headers.get("Authorization") for one in worker.requests}
    # An answer may say what was asked for, but no key.
    assert not [one for one in answers if MARK in one.replace(f"prompt {MARK}", "")]

    said = caplog.text + "".join(str(one.__dict__) for one in caplog.records)
    assert "stay in use" in said, "the log was not seen"
    assert MARK not in said


async def test_no_startup_error_contains_a_key(tmp_path: Path) -> None:
    errors: list[ConfigError] = []

    for text in (f"{MARK}", f"{MARK} a rps={MARK}", f"{MARK} a {MARK}", f"{MARK} a\n{MARK} b", "\xff"):
        path = tmp_path / "keys"
        path.write_bytes(text.encode("latin-1"))
        path.chmod(0o600)
        for settings in ({"api_keys_file": path}, {"admin_api_key_file": path}):
            try:
                async with running_router(RouterConfig.of(port=0, **settings)):  # type: ignore[arg-type]
                    pass
            except ConfigError as error:
                errors.append(error)

    assert len(errors) > 5
    assert MARK not in "".join(repr(error) + repr(error.__cause__) for error in errors)


def test_the_repr_of_objects_with_keys_shows_no_key() -> None:
    config = RouterConfig.of(api_key=MARK)
    call = GenerationRequest(
        Api.GENERATE, {"text": MARK}, "r", False, ("r",), None, 1, None, authorization=MARK
    )
    for one in (config, call, Keys({MARK: True}), vars(Keys({MARK: True}))):
        assert MARK not in repr(one)


def test_the_logged_command_line_shows_no_key(tmp_path: Path) -> None:
    flags = [
        "--api-key",
        f"{MARK}-a",
        "--control-plane-api-keys",
        f"id:name:admin:{MARK}",
        "--log-level",
        "debug",
    ]
    with launched(*flags) as (process, lines):
        assert "router ready" in lines
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=20)
        assert MARK not in lines + rest
    with pytest.raises(ConfigError) as caught:
        static_server(f"http://me:{MARK}@127.0.0.1:1", Role.COLOCATED)
    assert MARK not in str(caught.value)


def test_sighup_makes_the_router_read_key_files_again(tmp_path: Path) -> None:
    keys = secret(tmp_path / "keys", f"{MARK} alice\n")
    with launched("--api-keys-file", str(keys)) as (process, _):
        assert process.stderr is not None
        process.send_signal(signal.SIGHUP)
        line = process.stderr.readline()
        assert "read again" in line
        assert "keys=1" in line
        assert process.poll() is None
