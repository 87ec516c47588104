"""Every transport against the suite that ships with the package."""

import pytest

from memserve.core.errors import ConfigError
from memserve.core.ids import new_epoch
from memserve.testing.transport_conformance import NUM_BYTES, TransportConformance
from memserve.testing.transport_peer import PeerProcess, open_transport


class TestLocal(TransportConformance):
    transport_name = "local"
    needs_running_peer = False


class TestTcp(TransportConformance):
    transport_name = "tcp"

    def restarted(self, dead: PeerProcess) -> PeerProcess:
        return PeerProcess("tcp", NUM_BYTES, port=int(dead.peer.address.rpartition(":")[2]))


class TestMooncake(TransportConformance):
    transport_name = "mooncake"
    can_fence = False
    always_settles = False

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def mooncake(cls) -> None:
        try:
            open_transport("mooncake", new_epoch()).close()
        except ConfigError as error:
            pytest.skip(str(error))
