"""A process with a pool and its `Peers`, driven, stopped and killed by `test_peers_faults`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mempool.harness import content, keys_of, make_pool, store
from memserve.core.errors import OutOfBlocks
from memserve.core.ids import Epoch
from memserve.mempool.remote.config import PeersConfig
from memserve.mempool.remote.peers import Peers
from memserve.peering.endpoint import TransferEndpoint
from memserve.peering.remote_process import PeerAddress
from memserve.testing.transport_process import serve
from memserve.transport.registry import TransportConfig, open_transports


def main() -> None:
    transport, num_slots, reservation_s, port = sys.argv[1:]
    pool = make_pool(int(num_slots))
    where = TransportConfig(transport, control_port=int(port))  # type: ignore[arg-type]
    config = PeersConfig(timeout_s=2.0, reservation_s=float(reservation_s), lease_s=float(reservation_s))
    peers = Peers(TransferEndpoint(where), partial(open_transports, where, None), lambda _: pool, config)
    peers.add(pool)

    def has(prompt: list[int]) -> int:
        """How many blocks of a prompt are cached, or -1 if one of them is not what it should be."""
        match = pool.match(keys_of(prompt))
        blocks = zip(match.keys, match.addrs, strict=True)
        return len(match) if all(pool.block(addr) == content(key) for key, addr in blocks) else -1

    def put(prompt: list[int]) -> None:
        store(pool, prompt)

    def fill(first: int) -> int:
        """Cache new one-block prompts until they would evict each other; returns how many are intact."""
        count = pool.stats().free + pool.stats().evictable
        pool.clear()
        for token in range(first, first + count):
            try:
                store(pool, [token])
            except OutOfBlocks:
                break
        return sum(has([token]) == 1 for token in range(first, first + count))

    def flip(prompt: list[int]) -> None:
        """One bit of the last block."""
        pool.block(pool.match(keys_of(prompt)).addrs[-1])[0] ^= 1

    def reserve(control: str, epoch: int, num_blocks: int) -> int:
        """Reserve blocks and leave it at that."""
        peer = peers._use(PeerAddress(control, Epoch(epoch)), pool)
        keys = keys_of([9] * num_blocks)
        return len(peer.remote.exchange(lambda connection: peer.sender.reserve(connection, keys, None)).addrs)

    def push(control: str, epoch: int, prompt: list[int]) -> int:
        return peers.transfer_with_insert(PeerAddress(control, Epoch(epoch)), pool, keys_of(prompt)).num_sent

    def stats() -> dict[str, int]:
        return asdict(pool.stats()) | asdict(peers.stats())

    verbs = (has, put, fill, flip, reserve, push, stats)
    serve(
        {"control": peers.address.control, "epoch": peers.address.epoch},
        {verb.__name__: verb for verb in verbs},
    )


if __name__ == "__main__":
    main()
