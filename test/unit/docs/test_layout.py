"""docs/development/layout.md answers each question with a file that exists and contains the named symbol."""

from __future__ import annotations

import re

from .pages import ROOT, tables

PAGE = ROOT / "docs" / "development" / "layout.md"
ANSWERS = [row for row in tables(PAGE) if len(row) == 3 and row[0].endswith("?")]
# The questions of the redesign's review; the page may answer more.
REQUIRED = (
    "Where is Eq. 1 computed?",
    "Where is a block's checksum verified?",
    "Where is the prefill/decode handoff?",
    "Where is a request retried?",
    "Where is a routing policy added?",
    "Where is a transport added?",
    "Where is an eviction policy added?",
    "Where are the router's metrics defined?",
    "Where are the router's configuration defaults?",
)


def test_layout_page_answers_every_required_question_once() -> None:
    questions = [row[0] for row in ANSWERS]
    assert len(questions) == len(set(questions))
    assert set(REQUIRED) <= set(questions)


def test_layout_page_answers_name_one_existing_file_with_its_symbol() -> None:
    for question, file, symbol in ANSWERS:
        paths = re.findall(r"`([^`]+)`", file)
        assert len(paths) == 1, question
        text = (ROOT / paths[0]).read_text()
        for name in re.findall(r"`([^`]+)`", symbol):
            assert re.search(rf"\b{re.escape(name)}\b", text), f"{question} {paths[0]} has no {name}"


def test_layout_page_names_every_package() -> None:
    packages = {path.parent.name for path in (ROOT / "python" / "memserve").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"\b([a-z]+)/", PAGE.read_text()))
