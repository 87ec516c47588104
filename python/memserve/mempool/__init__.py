"""The paper's MemPool: KV blocks in DRAM, found by key. Knows no SGLang, no torch and no sockets.

    pool          the verbs; the one lock           n blocks: about n us under it, no byte moves there
    cache         slots and index, changed together
      allocator   who owns each slot                take, move: O(n)
      index       keys -> slots, pins, uses         match O(log n) + the answer; pin O(newly pinned)
        eviction  which leaf goes first             O(log leaves) per block
      events      what changed, for followers       the net effect, O(1) per block
    reservations  slots promised to peers
    arena         the bytes, a sealed memfd         free_memory: what it may take
    integrity     a checksum per block
    records, lease: what the verbs answer with

Refused: a lease count per block (a pin stops at the first pinned ancestor instead), time stamps (a
use is a tick, so that orderings are pure), and blocks whose parent is not cached (nobody would find
them by a whole prompt, and the tree would not be prefix-closed).
"""
