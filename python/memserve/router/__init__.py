"""The router: who is there (`cluster`), who gets a request (`policy`), and how it is carried out.

    http ──> validation ──> policy ──> pair | upstream ──> prefill and decode servers
                              ^
    control (ZMQ), probe ──> cluster

Everything runs on one asyncio loop. Imports `wire` and `core` only: no torch, no sglang.
"""
