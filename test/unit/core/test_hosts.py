"""Free ports that a process keeps, and ports in use."""

from __future__ import annotations

import asyncio
import socket

import pytest

from memserve.core.hosts import can_listen, keep_port


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])
def test_a_server_can_listen_on_a_kept_port(host: str) -> None:
    async def listen(port: int) -> None:
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port)
        server.close()
        await server.wait_closed()

    port = keep_port(host)
    assert can_listen(host, port)
    asyncio.run(listen(port))


def test_a_kept_port_is_given_to_no_other_socket() -> None:
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", keep_port()))


def test_can_listen_is_false_for_a_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert not can_listen("127.0.0.1", other.getsockname()[1])
