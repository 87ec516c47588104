"""Scheduling, as a pure library: chooses instances and fetches for requests, and learns from the results."""
