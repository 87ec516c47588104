"""Hooks into SGLang's scheduler: the pool's, the handoff's."""
