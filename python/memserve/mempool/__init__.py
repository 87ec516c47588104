"""The paper's MemPool: KV blocks in DRAM and HBM, found by key. Knows no SGLang, no torch, no sockets.

    pool          the verbs                         n blocks: about n us locked, no byte moves then
    leases        where blocks are, holds on them   match O(log n) + the answer; pin O(newly pinned)
    swap          blocks from tier to tier          a copy and a checksum each
    reservations  slots promised to peers
    tier_pool     one tier: bytes, sums, size       resize: a copy of what is in the way
      arena       the bytes, a sealed memfd         free_memory: what it may take
      cache       slots and index, changed together
        allocator who owns each slot                take, move: O(n)
        index     keys -> slots, pins, uses
          eviction  which leaf goes first           O(log leaves) per block
        events    what changed, for followers       the net effect, O(1) per block
    integrity     a checksum per block
    records, lease: what the verbs answer with

Refused: a lease count per block (a pin stops at the first pinned ancestor instead), time stamps (a
use is a tick, so that orderings are pure), blocks whose parent is not cached in the same tier (nobody
would find them by a whole prompt; a swapped-out tail takes a copy of its head along), and pinning
what moves (a copy is looked at afterwards: still there, still unleased? Or it was for nothing).
"""
