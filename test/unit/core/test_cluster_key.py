"""The cluster's secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from memserve.core.cluster_key import MIN_KEY_BYTES, ClusterKey
from memserve.core.errors import ConfigError

SECRET = b"0123456789abcdef"


def written(path: Path, content: bytes = SECRET, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_cluster_keys_of_other_labels_or_secrets_are_unrelated() -> None:
    keys = {
        ClusterKey(secret).derive(label) for secret in (SECRET, SECRET + b"x") for label in ("a", "b", "")
    }
    assert len(keys) == 6
    assert {len(key) for key in keys} == {32}
    assert SECRET not in keys


def test_cluster_keys_of_one_secret_are_equal() -> None:
    assert ClusterKey(SECRET).derive("a") == ClusterKey(SECRET).derive("a")


def test_cluster_key_does_not_show_its_secret() -> None:
    key = ClusterKey(SECRET)
    shown = f"{key!r}{key}{key.__dict__.keys()}"
    assert SECRET.decode() not in shown
    with pytest.raises(ConfigError) as caught:
        ClusterKey(b"hunter2")
    assert "hunter2" not in str(caught.value)
    assert str(MIN_KEY_BYTES) in str(caught.value)


def test_cluster_key_ignores_white_space_around_it(tmp_path: Path) -> None:
    key = ClusterKey.read(written(tmp_path / "key", b"\n " + SECRET + b"\n"))
    assert key.derive("a") == ClusterKey(SECRET).derive("a")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o620])
def test_cluster_key_refuses_a_file_that_other_users_can_read(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        ClusterKey.read(written(tmp_path / "key", mode=mode))


@pytest.mark.parametrize("content", [b"", b"short", b" " * 40])
def test_cluster_key_refuses_a_short_secret(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match="at least"):
        ClusterKey.read(written(tmp_path / "key", content))


def test_cluster_key_error_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        ClusterKey.read(tmp_path / "missing")
