"""The documentation's pages as the tests read them: links, headings, code blocks, tables."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```\s*$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_LINK = re.compile(r"(?<!\!)\[[^\]\[]*\]\(([^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """One fenced block."""

    language: str
    text: str


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_blocks(page: Path) -> list[CodeBlock]:
    return [CodeBlock(found[2], found[3]) for found in _FENCE.finditer(page.read_text())]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def links(page: Path) -> list[str]:
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """Ids of the headings, as Python-Markdown makes them."""
    return {_slug(heading) for heading in _HEADING.findall(prose(page))}


def tables(page: Path) -> list[list[str]]:
    """The cells of every table row, heads and rules left out."""
    lines = prose(page).splitlines()
    rows = []
    for above, line in zip(["", *lines], lines, strict=False):
        is_rule = bool(re.fullmatch(r"\|[-:| ]+\|", line))
        if is_rule and rows and above.startswith("|"):
            rows.pop()
        elif line.startswith("|") and not is_rule:
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def _slug(heading: str) -> str:
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    ascii_only = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())
