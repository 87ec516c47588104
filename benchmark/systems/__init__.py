"""What is compared, each as real processes on this machine: ours in every caching mode, and stock SGLang.

Knows how they are started, asked to forget, and what they say of themselves; nothing of load.
"""
