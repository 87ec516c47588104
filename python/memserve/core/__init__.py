"""Ids, errors, keys and configuration that every other part shares; stdlib and msgspec only."""
