"""Key files give tenants and admins; a file that becomes invalid revokes no key."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from memserve.core.errors import ConfigError
from memserve.router.auth.keys import KeyFile, admin_keys, tenant_keys
from memserve.router.tenant import Rates, Tenant

KEYS = "# keys\n\nkey-a alice rps=2 weight=3\nkey-b bob\nkey-a2 alice tps=50\n"


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def names(file: KeyFile[Tenant], *keys: str) -> list[str | None]:
    owners = [file.keys.owner(key) for key in keys]
    return [owner and owner.name for owner in owners]


def test_tenant_keys_give_tenants_and_their_rates(tmp_path: Path) -> None:
    file = tenant_keys(write(tmp_path / "keys", KEYS))
    assert names(file, "key-a", "key-b", "key-a2", "key-c", "") == ["alice", "bob", "alice", None, None]
    alice, bob = file.keys.owner("key-a"), file.keys.owner("key-b")
    assert alice == file.keys.owner("key-a2") == Tenant("alice", Rates(rps=2, tps=50, weight=3))
    assert bob == Tenant("bob", Rates())


@pytest.mark.parametrize(
    "line",
    [
        "s3cret",
        "s3cret a b",
        "s3cret a rps=",
        "s3cret a rps=0",
        "s3cret a rps=-1",
        "s3cret a tps=nan",
        "s3cret a weight=inf",
        "s3cret a cpu=1",
        "s3cret a\ns3cret b",
        "s3cret a rps=1\nother a rps=2",
    ],
)
def test_key_file_error_names_the_line_and_does_not_show_it(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=r"line \d") as caught:
        tenant_keys(write(tmp_path / "keys", line))
    assert "s3cret" not in str(caught.value)


def test_empty_binary_and_readable_key_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no API key"):
        tenant_keys(write(tmp_path / "none", "# nothing\n"))
    with pytest.raises(ConfigError, match="chmod 600"):
        tenant_keys(write(tmp_path / "open", KEYS, 0o644))
    with pytest.raises(ConfigError, match="cannot read"):
        tenant_keys(tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"s3cret\xff\xfe a")
    (tmp_path / "binary").chmod(0o600)
    with pytest.raises(ConfigError, match="no text") as caught:
        tenant_keys(tmp_path / "binary")
    assert caught.value.__cause__ is None, "it would show the file"


def test_admin_keys_may_have_a_name(tmp_path: Path) -> None:
    file = admin_keys(write(tmp_path / "keys", "one\n# no\ntwo ops\n"))
    assert [file.keys.owner(key) for key in ("one", "two", "ops", "no")] == ["-", "ops", None, None]
    with pytest.raises(ConfigError, match="line 1"):
        admin_keys(write(tmp_path / "keys", "one two three\n"))


def test_key_file_is_read_again_when_it_changes_unless_it_is_invalid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "keys", KEYS)
    file = tenant_keys(path)
    write(path, "key-c carol\n")
    file.reload()
    assert names(file, "key-a", "key-c") == [None, "carol"]
    caplog.set_level(logging.INFO)
    for text, mode in (("key-d\n", 0o600), ("", 0o600), ("key-d dave\n", 0o640)):
        caplog.clear()
        write(path, text, mode)
        file.reload()
        file.reload()
        assert names(file, "key-c", "key-d") == ["carol", None]
        assert [record.levelname for record in caplog.records] == ["ERROR"], "it is said once"
    path.unlink()
    file.reload()
    assert names(file, "key-c") == ["carol"]
    write(path, "key-d dave\n")
    file.reload()
    assert names(file, "key-c", "key-d") == [None, "dave"]
    assert "key-" not in caplog.text


def test_key_file_is_read_again_on_demand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = tenant_keys(write(tmp_path / "keys", KEYS))
    file.reload()
    assert not caplog.records
    file.reload(is_forced=True)
    assert "keys=3" in caplog.text


def test_keys_with_invalid_bytes_have_no_owner(tmp_path: Path) -> None:
    file = tenant_keys(write(tmp_path / "keys", KEYS))
    assert names(file, "\udcff", "\x00", "é") == [None, None, None]
