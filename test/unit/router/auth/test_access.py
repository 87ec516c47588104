"""Clients generate, admins see and change; admin access without configured admin keys is refused."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from memserve.core.errors import BadRequest
from memserve.router.auth.access import ADMIN_FLAG, Access, key_of
from memserve.router.auth.keys import KeyFile, admin_keys, tenant_keys
from memserve.router.tenant import SOLE_TENANT, Tenant


def secret(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.fixture
def tenants(tmp_path: Path) -> KeyFile[Tenant]:
    return tenant_keys(secret(tmp_path / "tenants", "key-a alice\n"))


@pytest.fixture
def admins(tmp_path: Path) -> KeyFile[str]:
    return admin_keys(secret(tmp_path / "admins", "root-key ops\n"))


def refusal(access: Access, authorization: str | None) -> tuple[int, str]:
    """Status and message of an admin check; 200 if it succeeds."""
    try:
        access.check_admin(authorization)
    except BadRequest as error:
        return error.status, error.message
    return 200, ""


def test_access_on_loopback_without_keys_allows_everything() -> None:
    access = Access()
    assert access.authenticate(None) is SOLE_TENANT
    assert access.is_admin(None)
    assert access.upstream_authorization("Bearer own") == "Bearer own"


def test_access_of_an_exposed_router_without_keys_allows_clients_only() -> None:
    access = Access(is_exposed=True)
    assert access.authenticate(None) is SOLE_TENANT
    status, words = refusal(access, "Bearer anything")
    assert status == 403
    assert ADMIN_FLAG in words


def test_a_tenants_key_is_no_admin_key(tenants: KeyFile[Tenant]) -> None:
    access = Access(tenants=tenants)
    assert access.authenticate("Bearer key-a").name == "alice"
    for authorization in (None, "Bearer key-a", "Bearer root-key"):
        status, words = refusal(access, authorization)
        assert status == 403
        assert ADMIN_FLAG in words
    assert access.upstream_authorization("Bearer key-a") is None


def test_an_admin_key_is_no_tenants_key(tenants: KeyFile[Tenant], admins: KeyFile[str]) -> None:
    access = Access(tenants=tenants, admins=admins, is_exposed=True)
    assert access.check_admin("Bearer root-key") == "ops"
    for authorization in (None, "Bearer key-a", "Bearer ops"):
        assert refusal(access, authorization)[0] == 401
    with pytest.raises(BadRequest) as caught:
        access.authenticate("Bearer root-key")
    assert caught.value.status == 401


def test_the_single_api_key_is_sent_to_servers() -> None:
    access = Access(api_key="the-key", is_exposed=True)
    assert access.authenticate("Bearer the-key") is SOLE_TENANT
    assert refusal(access, "Bearer the-key")[0] == 200
    assert refusal(access, "Bearer another")[0] == 401
    assert access.upstream_authorization("Basic whatever") == "Bearer the-key"
    with pytest.raises(BadRequest):
        access.authenticate(None)


def test_with_tenants_the_api_key_is_the_servers_only(tenants: KeyFile[Tenant]) -> None:
    access = Access(tenants=tenants, api_key="the-key")
    assert access.upstream_authorization("Bearer key-a") == "Bearer the-key"
    with pytest.raises(BadRequest):
        access.authenticate("Bearer the-key")


def test_access_accepts_new_keys_without_a_restart(tmp_path: Path, tenants: KeyFile[Tenant]) -> None:
    access = Access(tenants=tenants)
    secret(tmp_path / "tenants", "key-b bob\n")
    access.reload()
    assert access.authenticate("Bearer key-b").name == "bob"
    with pytest.raises(BadRequest):
        access.authenticate("Bearer key-a")


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("Bearer k", "k"),
        ("bearer  k ", "k"),
        ("Basic " + base64.b64encode(b"any:k:2").decode(), "k:2"),
        ("Basic " + base64.b64encode(b"any").decode(), ""),
        ("Basic !", None),
        ("Basic " + base64.b64encode(b"\xff:\xff").decode(), None),
        ("Digest k", None),
        ("k", None),
        ("", None),
        (None, None),
    ],
)
def test_key_of_reads_bearer_tokens_and_basic_passwords(header: str | None, key: str | None) -> None:
    assert key_of(header) == key
