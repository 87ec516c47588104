"""Joins an instance to its cluster: KV handoff in Mooncake's place, and registration with the router."""
