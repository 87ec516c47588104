import pytest

from memserve.core.errors import BadRequest
from memserve.core.ids import Epoch
from memserve.disagg.transfer_engine import parse_session_id, session_id
from memserve.peering.remote_process import PeerAddress


@pytest.mark.parametrize("address", ["127.0.0.1:41234", "[::1]:1", "host.example:65535"])
def test_a_session_id_is_text_and_back(address: str) -> None:
    peer = PeerAddress(address, Epoch(243))
    assert session_id(peer) == f"{address}:243"
    assert parse_session_id(session_id(peer)) == peer


@pytest.mark.parametrize(
    "text", ["", "host", "host:1", "host:x:1", "host:0:1", "host:70000:1", ":1:1", "h:1:f3"]
)
def test_malformed_session_id_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="not a session id"):
        parse_session_id(text)
