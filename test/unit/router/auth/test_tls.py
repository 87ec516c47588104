"""The router's own certificate, and its verification of servers."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

import aiohttp
import pytest
import trustme

from memserve.core.errors import ConfigError
from memserve.router.app import running_router
from memserve.router.auth.tls import Certificate, client_context
from memserve.router.cluster.discovery.static import static_server
from memserve.router.config import RouterConfig
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import staged

BODY = {"text": "hello", "sampling_params": {"max_new_tokens": 2}}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def written(authority: trustme.CA, folder: Path) -> dict[str, Path]:
    """A certificate for 127.0.0.1, as flag values."""
    leaf = authority.issue_cert("127.0.0.1")
    files = {"ssl_certfile": folder / "cert.pem", "ssl_keyfile": folder / "key.pem"}
    files["ssl_keyfile"].touch(0o600)
    leaf.private_key_pem.write_to_path(files["ssl_keyfile"])
    files["ssl_certfile"].write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    return files


def believing(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def serial(port: int, context: ssl.SSLContext) -> object:
    """Serial number of the certificate on a new connection."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    shown = writer.get_extra_info("peercert")["serialNumber"]
    writer.close()
    return shown


async def test_clients_are_served_over_tls(authority: trustme.CA, tmp_path: Path) -> None:
    context = believing(authority)
    async with staged(FakeWorker(), **written(authority, tmp_path)) as stage:
        assert stage.router.url.startswith("https://")
        async with stage.client.post(stage.url("/generate"), json=BODY, ssl=context) as response:
            assert response.status == 200
        stream = {**BODY, "stream": True}
        async with stage.client.post(stage.url("/generate"), json=stream, ssl=context) as response:
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        async with stage.client.get(stage.url("/workers"), ssl=context) as response:
            assert response.status == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await stage.client.get(stage.url("/health"))
        with pytest.raises(aiohttp.ClientError):
            await stage.client.get(stage.url("/health").replace("https", "http"))


async def test_a_renewed_certificate_is_used_without_a_restart(
    authority: trustme.CA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = believing(authority)
    files = written(authority, tmp_path)
    async with staged(**files) as stage:
        port = int(stage.router.url.rsplit(":", 1)[1])
        first = await serial(port, context)
        written(authority, tmp_path)
        stage.router.ingress.reload(is_forced=True)
        second = await serial(port, context)
        assert first != second
        files["ssl_certfile"].write_text("nonsense")
        stage.router.ingress.reload(is_forced=True)
        assert await serial(port, context) == second
        assert "the old certificate stays in use" in caplog.text


def test_unusable_certificates_raise_config_error_with_their_path(
    authority: trustme.CA, tmp_path: Path
) -> None:
    files = written(authority, tmp_path)
    cert, key = files["ssl_certfile"], files["ssl_keyfile"]
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Certificate(cert, key)
    key.chmod(0o600)
    authority.issue_cert("127.0.0.1").private_key_pem.write_to_path(key)
    with pytest.raises(ConfigError, match=r"cert\.pem"):
        Certificate(cert, key)
    with pytest.raises(ConfigError, match="cannot read"):
        Certificate(cert, tmp_path / "missing")
    with pytest.raises(ConfigError, match="cannot read certificates"):
        client_context(tmp_path / "missing")
    with pytest.raises(ConfigError, match="go together"):
        RouterConfig.of(ssl_certfile=cert)


async def test_https_servers_are_verified(authority: trustme.CA, tmp_path: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    believed = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(believed)
    async with FakeWorker(tls=context) as worker:
        static = (static_server(worker.url, Role.COLOCATED),)
        async with staged(static=static, ssl_ca_certs=believed) as stage:
            await stage.until(stage.is_ready)
            assert (await stage.post("/generate", BODY))[0] == 200
            assert len(await stage.events("/generate", {**BODY, "stream": True})) > 1
        num_requests = len(worker.requests)
        assert num_requests == 2
        async with staged(static=static) as stage:
            member = stage.router.cluster.find(worker.url)
            assert member is not None
            await stage.until(lambda: "certificate" in member.reason.lower())
            assert (await stage.post("/generate", BODY))[0] == 503
        assert len(worker.requests) == num_requests


@pytest.mark.parametrize("is_encrypted", [False, True])
async def test_unencrypted_http_on_an_exposed_address_is_logged_once(
    authority: trustme.CA,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    is_encrypted: bool,
) -> None:
    key = tmp_path / "cluster.key"
    key.write_text("0123456789abcdef")
    key.chmod(0o600)
    files = written(authority, tmp_path) if is_encrypted else {}
    config = RouterConfig.of(host="0.0.0.0", port=0, cluster_key_file=key, **files)
    async with running_router(config):
        said = [one for one in caplog.records if "is not encrypted" in one.getMessage()]
        assert [one.levelno for one in said] == [logging.WARNING] * (not is_encrypted)
