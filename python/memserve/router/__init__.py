"""The router: one HTTP address in front of prefill, decode and colocated servers.

    http      a request is read, and its answer written; pages for people and programs
    text      what the servers will see of it: token ids
    placing   where it goes: policy, ledger, the decision, fetching history first
    tree      who holds which block of KV: the global prompt tree
    costs     what work takes
    serving   its legs at the servers, retries, merged answers
    cluster   who is there, in which state; the control plane
    observe   metrics
    simulation   tree, costs and policies again, with simulated servers

Everything runs on one asyncio loop. Imports `wire` and `core` only: no torch, no sglang.
"""
