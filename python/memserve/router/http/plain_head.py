"""Recognizes the head of a plain request: one that the router's own connections may answer.

Accepts no head that aiohttp would refuse or read otherwise. Knows no sockets.
"""

from __future__ import annotations

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from memserve.router.request import Api

MAX_HEADERS = 128
"""Most headers of any request."""

_REQUEST_LINES = {f"POST {api} HTTP/1.1".encode(): api for api in Api}
_REQUEST_LINES[f"PUT {Api.GENERATE} HTTP/1.1".encode()] = Api.GENERATE
_NOT_PLAIN = frozenset({"transfer-encoding", "content-encoding", "expect", "upgrade"})


class _Headers(dict[str, str]):
    """Headers as httptools reports them: names in lower case, values as aiohttp decodes them."""

    def on_header(self, name: bytes, value: bytes) -> None:
        self[str(name, "latin-1").lower()] = str(value, "utf-8", "surrogateescape").strip(" \t")


def plain_head(head: bytes, max_header_bytes: int) -> tuple[Api, dict[str, str], int] | None:
    """Endpoint, headers and body length; None if not plain. `head` ends before the blank line."""
    api = _REQUEST_LINES.get(head[: head.find(b"\r\n")])
    if api is None or (
        len(head) > max_header_bytes and max(map(len, head.split(b"\r\n"))) > max_header_bytes
    ):
        return None
    headers = _Headers()
    try:
        HttpRequestParser(headers).feed_data(head + b"\r\n")
    except (HttpParserError, HttpParserUpgrade):
        return None
    length = headers.get("content-length", "")
    # Fewer headers than lines: repeated, empty or folded ones.
    if len(headers) != head.count(b"\r\n") - 1 or not (length.isdecimal() and length.isascii()):
        return None
    if len(headers) > MAX_HEADERS:
        return None
    if "host" not in headers or not _NOT_PLAIN.isdisjoint(headers):
        return None
    if headers.get("connection", "keep-alive").lower() != "keep-alive":
        return None
    return api, headers, int(length)
