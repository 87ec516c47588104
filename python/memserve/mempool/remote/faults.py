"""What goes wrong between two pools that has no name elsewhere. Never leaves this package."""

from __future__ import annotations

from memserve.core.errors import Retryable


class HandshakeRequired(Retryable):
    """What two pools knew of each other's memory is out of date: introduce yourself again."""
