"""URLs of servers that are named: one spelling per server, and no URL that is not one."""

from __future__ import annotations

import pytest

from memserve.core.errors import ConfigError
from memserve.router.cluster.discovery.static import server_url, static_server
from memserve.router.command_line import parse_args
from memserve.wire.messages import Role

BAD = [
    *("", "127.0.0.1:1", "//127.0.0.1:1", "http://", "http:", "http:///a", "http://:1", "http:127.0.0.1:1"),
    *("ftp://x", "ws://x", "unix:/tmp/s", "file:///etc/passwd"),
    *(
        "http://a b",
        "http://a b:1",
        " http://a",
        "http://a ",
        "http://a\t:1",
        "http://a\n",
        "http://a\r\nX: y",
    ),
    *("http://a/b c", "http://a\x00", "http://a\x7f:1", "http://bücher:1"),
    *("http://a?b", "http://a:1/?a=b", "http://a:1/b?", "http://a#b", "http://a:1/#", "http://a\\b"),
    *("http://me:pw@a:1", "http://me@a:1", "http://a:1/@"),
    *("http://a:0", "http://a:65536", "http://a:x", "http://a:-1", "http://a:1:2"),
    *("http://[::1", "http://::1", "http://[a]", "http://a%20b", "http://-a", "http://a,b", "http://a;b:1"),
]


@pytest.mark.parametrize("url", BAD)
def test_a_url_that_names_no_server_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        static_server(url, Role.COLOCATED)
    message = str(raised.value)
    assert message.isprintable()
    assert "http://HOST:PORT" in message
    assert "pw" not in message
    for flag in ("--worker-urls", "--decode", "--prefill"):
        with pytest.raises(ConfigError):
            parse_args([f"{flag}={url}"] if url.startswith("-") else [flag, url])


@pytest.mark.parametrize(
    ("spelling", "url"),
    [
        ("http://127.0.0.1:1/", "http://127.0.0.1:1"),
        ("http://127.0.0.1:1//", "http://127.0.0.1:1"),
        ("HTTP://LocalHost:1", "http://localhost:1"),
        ("http://a:80/", "http://a"),
        ("https://a:443", "https://a"),
        ("http://a:443", "http://a:443"),
        ("http://a:", "http://a"),
        ("http://a:0080", "http://a"),
        ("http://a_b.c-d.:1", "http://a_b.c-d.:1"),
        ("http://a:1/Path/b/", "http://a:1/Path/b"),
        ("http://[::1]:1/", "http://[::1]:1"),
        ("http://[FE80::1%25eth0]:1", "http://[fe80::1%25eth0]:1"),
    ],
)
def test_every_spelling_of_a_url_names_one_server(spelling: str, url: str) -> None:
    assert server_url(spelling) == url
    assert server_url(url) == url
    assert static_server(spelling, Role.DECODE).instance_id == url


def test_a_server_named_twice_on_the_command_line_is_one() -> None:
    urls = ["http://a:1", "http://a:1/", "HTTP://A:1", "http://b:80", "http://b"]
    static = parse_args(["--worker-urls", *urls]).config.cluster.static
    assert [info.url for info in static] == ["http://a:1", "http://b"]
    with pytest.raises(ConfigError, match="named twice"):
        parse_args(["--worker-urls", "http://a:1", "--decode", "http://a:1"])
