"""Copies over TCP: MemServe's own data plane."""
