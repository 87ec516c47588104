"""The same tree, cost model and policies against simulated instances."""
