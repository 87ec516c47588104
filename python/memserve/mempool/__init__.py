"""A memory pool for KV blocks: the paper's MemPool. Knows no SGLang and no torch."""
