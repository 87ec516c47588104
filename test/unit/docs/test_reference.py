"""The generated pages say what the code says now."""

from __future__ import annotations

import pytest

from .reference import make_reference


@pytest.mark.parametrize("name", make_reference.PAGES)
def test_reference_page_is_up_to_date(name: str) -> None:
    written = (make_reference.REFERENCE / name).read_text()
    assert written == make_reference.PAGES[name](), "out of date: run `make docs`"


def test_a_page_that_differs_from_the_code_is_reported_as_stale(tmp_path) -> None:
    for name in make_reference.PAGES:
        (tmp_path / name).write_text((make_reference.REFERENCE / name).read_text())
    (tmp_path / "server-flags.md").write_text("old")
    assert "server-flags.md" in make_reference.stale(tmp_path)
