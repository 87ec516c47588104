"""Copies on one host: process memory and memfds."""
