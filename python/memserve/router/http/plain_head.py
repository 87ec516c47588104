"""Reads the heads of requests that are as plain as those for generation usually are. Refuses nothing."""

from __future__ import annotations

import re

from memserve.router.request import Api

_NAME = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_VALUE = rb"[\t\x20-\x7e\x80-\xff]*"
_LINE = re.compile(rb"(%b):[ \t]*(%b)\r\n" % (_NAME, _VALUE))
_HEAD = re.compile(
    rb"(?:POST|PUT(?= /generate )) (%b) HTTP/1\.1\r\n((?:%b:%b\r\n)+)"
    % (b"|".join(re.escape(api.encode()) for api in Api), _NAME, _VALUE)
)
_NOT_PLAIN = frozenset({"transfer-encoding", "content-encoding", "expect", "upgrade"})


def plain_head(head: bytes) -> tuple[Api, dict[str, str], int] | None:
    """What a plain request's head, up to its blank line, asks for, its headers, the length of its body."""
    match = _HEAD.fullmatch(head)
    if match is None:
        return None
    lines = _LINE.findall(match[2])
    headers = {str(name, "latin-1").lower(): str(value, "latin-1").rstrip(" \t") for name, value in lines}
    length = headers.get("content-length", "")
    if len(headers) != len(lines) or not (length.isdecimal() and length.isascii()) or "host" not in headers:
        return None
    if not _NOT_PLAIN.isdisjoint(headers) or headers.get("connection", "keep-alive").lower() != "keep-alive":
        return None
    return Api(str(match[1], "latin-1")), headers, int(length)
