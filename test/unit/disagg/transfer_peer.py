"""A process with a transfer engine and some memory, driven by `test_transfer_engine`."""

import sys

import numpy as np

from memserve.disagg.transfer_engine import TransferEngine
from memserve.peering.endpoint import TransferEndpoint
from memserve.testing.transport_process import serve
from memserve.transport.registry import TransportConfig

NUM_BYTES = 1 << 20


def main() -> None:
    transport, key_file, port = sys.argv[1:]
    config = TransportConfig(
        transport,  # type: ignore[arg-type]
        control_port=int(port),
        cluster_key_file=key_file or None,
    )
    engine = TransferEngine(TransferEndpoint(config), config, timeout_s=5.0)
    memory = np.zeros(2 * NUM_BYTES, np.uint8)
    first, second = memory[:NUM_BYTES], memory[NUM_BYTES:]
    engine.register(first.ctypes.data, NUM_BYTES)

    def register_more() -> int:
        return engine.batch_register([second.ctypes.data], [NUM_BYTES])

    def register_anew() -> None:
        engine.deregister(first.ctypes.data)
        engine.register(first.ctypes.data, NUM_BYTES)

    def contents(start: int, stop: int) -> str:
        return memory[start:stop].tobytes().hex()

    serve(
        {"session": engine.get_session_id(), "address": memory.ctypes.data},
        {"register_more": register_more, "register_anew": register_anew, "contents": contents},
    )


if __name__ == "__main__":
    main()
