"""The paper's MemPool: KV blocks in DRAM, found by key. Knows no SGLang, no torch, no sockets.

    pool          the verbs                         n blocks: about n us locked; bytes move unlocked
    leases        places of blocks, holds on them   match O(log n) + the answer; pin O(newly pinned)
    reservations  slots promised to peers
    tier_pool     one tier: bytes, checksums, size  resize: a copy of what is in the way
      arena       the bytes, a sealed memfd
      cache       slots and index, changed together
        allocator the state of each slot            take, move: O(n)
        index     keys -> slots, pins, uses
          eviction  which leaf goes first           O(log leaves) per block
        events    what changed, for followers       the net effect, O(1) per block
    records       what the verbs answer with

Refused: a lease count per block (a pin stops at the first pinned ancestor instead); time stamps (a use
is a tick, so that eviction policies are pure); blocks whose parent is not cached in the same tier (a match
of a whole prompt would not find them); pinning what `resize` moves (it copies first, and drops the copy if
the block left its slot or was leased meanwhile).
"""
