"""The SGLang internals that MemServe uses are as expected; a failure names the internal."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, entry_points

import pytest

from memserve.core.errors import ConfigError
from memserve.engine import request_seams
from memserve.engine import sglang_internals as seams


@pytest.mark.parametrize("seam", [*seams.SEAMS, *request_seams.SEAMS], ids=lambda seam: seam.name)
def test_sglang_internal_is_as_expected(seam: seams.Seam) -> None:
    assert seam.problem() is None


def test_missing_sglang_internal_is_reported_by_name_and_purpose() -> None:
    gone = seams.Seam("clock", "time:no_such_clock", "telling the time")
    assert gone.problem() is not None
    assert "'clock'" in str(gone.problem())
    assert "telling the time" in str(gone.problem())
    assert "retries" in str(seams.Seam("dump", "json:dumps", "tests", parameters=("retries",)).problem())
    assert "Nope" in str(seams.Seam("json", "json", "tests", members=("Nope",)).problem())


def test_other_sglang_version_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    seams.check_version()
    monkeypatch.setattr(seams, "version", lambda _: "0.4.0")
    with pytest.raises(ConfigError, match=r"0\.4\.0 .* needs 0\.5\.23.*install\.py"):
        seams.check_version()


def test_missing_sglang_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_there(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(seams, "version", not_there)
    with pytest.raises(ConfigError, match="install"):
        seams.check_version()


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("sglang.srt.platforms", "memserve_cpu"),
        ("sglang.srt.plugins", "memserve"),
        ("torch.backends", "memserve_torchvision"),
    ],
)
def test_entry_points_are_installed(group: str, name: str) -> None:
    (entry,) = (entry for entry in entry_points(group=group) if entry.name == name)
    assert callable(entry.load())
