"""ResumableStream passes events on; StreamRecovery decides which streams are remembered."""

from __future__ import annotations

import pytest

from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.instance import ClusterSnapshot, Instance
from memserve.router.proxy.recovery import MAX_EVENT_BYTES, ResumableStream, StreamRecovery, StreamState
from memserve.router.request import Api, GenerationRequest
from memserve.router.server_info import ServerInfo
from memserve.router.tokenization.tokenizers import Tokenizers
from memserve.wire.messages import Role


class _Kept:
    """A client that keeps its chunks."""

    has_begun = True

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    async def write(self, chunk: bytes) -> None:
        self.chunks.append(chunk)


@pytest.mark.parametrize(
    "stream", [b"data: 1\r\n\r\ndata: 2\r\n\r\n", b"data: " + b"x" * 2 * MAX_EVENT_BYTES, b"data: 1"]
)
async def test_resumable_stream_passes_on_unknown_events_unchanged(stream: bytes) -> None:
    client = _Kept()
    call = GenerationRequest(Api.GENERATE, {}, "me", False, ("me",), None, 1, None)
    resumable = ResumableStream(client, StreamState(call))
    for start in range(0, len(stream), 1 << 16):
        await resumable.write(stream[start : start + (1 << 16)])
    assert resumable.state is None or len(stream) < 10
    await resumable.end()
    assert b"".join(client.chunks) == stream


def test_sampled_stream_is_remembered_only_with_deterministic_servers() -> None:
    def ready(*deterministic: bool) -> ClusterSnapshot:
        return ClusterSnapshot.of(
            Instance(InstanceId(str(n)), Epoch(1), Role.COLOCATED, "http://a:1", None, facts)
            for n, one in enumerate(deterministic)
            for facts in [ServerInfo("m", "/m", is_deterministic=one)]
        )

    call = GenerationRequest(
        Api.GENERATE, {"text": "x", "sampling_params": {}}, "me", False, ("me",), None, 1, None
    )
    recovery = StreamRecovery(Tokenizers(None), is_on=True)
    assert recovery.open(call, _Kept(), ready(True, True)).state is not None
    for servers in (ready(), ready(True, False), ready(False)):
        assert recovery.open(call, _Kept(), servers).state is None
