"""Moves bytes between registered regions of processes. Knows no blocks, no KV, no SGLang."""
