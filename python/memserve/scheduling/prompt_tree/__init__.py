"""The global prompt tree: who holds which block, as the instances report it. Knows no HTTP."""
