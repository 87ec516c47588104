"""Links, anchors and paths in README and docs lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .pages import PAGES, ROOT, anchors, links, name_of, prose

_PATH = re.compile(
    r"`((?:python|test|docs|scripts|benchmark|deploy)/[\w./*-]*|mkdocs\.yml|Makefile|pyproject\.toml)`"
)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_and_anchor_resolves(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), f"{link} names no file"
        if anchor:
            assert anchor in anchors(file), f"{link} names no heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_path_named_in_prose_exists(page: Path) -> None:
    for path in _PATH.findall(prose(page)):
        assert list(ROOT.glob(path)), f"{path} does not exist"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = set(re.findall(r"[\w/-]+\.md", navigation))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.name != "README.md"}
