"""README stays a first page: about 900 words."""

from __future__ import annotations

from .pages import ROOT


def test_readme_has_between_850_and_950_words() -> None:
    assert 850 <= len((ROOT / "README.md").read_text().split()) <= 950
