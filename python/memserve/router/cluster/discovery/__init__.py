"""Servers that do not register: named, or found among pods."""
