"""Logs, metrics, traces, and the records that the dashboard shows."""
