"""One pool's view of the other pools in its cluster, as the router lists them.

    listed by the router ──> member ──listed no more, or replaced──> gone: `on_gone`, once

An absent router changes nothing: pools reach each other without it. A router that restarts lists only
the pools that have registered again, so the missing ones get some time to do so. Knows no memory and
no blocks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from memserve.core.ids import Epoch
from memserve.instance.registration import ANSWER_TIMEOUT_S, RETRY_S, RegistrationMessages, RouterRegistration
from memserve.wire.link import ControlClient
from memserve.wire.messages import (
    DeregisterPool,
    Members,
    Message,
    PoolHeartbeat,
    PoolInfo,
    RegisterPool,
    Role,
    TierBlocks,
)

logger = logging.getLogger(__name__)


class Membership:
    """Registers a pool, then sends heartbeats on a thread of its own. Any thread may read the view."""

    def __init__(
        self,
        client: ControlClient,
        info: PoolInfo,
        *,
        on_gone: Callable[[Epoch], None],
        tiers: Callable[[], tuple[TierBlocks, ...]] = tuple,
        clock: Callable[[], float] = time.monotonic,
        grace_heartbeats: int = 5,
    ) -> None:
        """Begins at once: the pool must answer its peers. Takes `client` and closes it in the end.

        The thread of this object calls `on_gone` with the epoch of each pool that was a member and is
        no longer; `on_gone` must not close this object. It calls `tiers` for each heartbeat.
        `grace_heartbeats`: time for the other pools to register again with a new router, beyond one lost
        answer and its repetition.
        """
        self._info = info
        self._on_gone = on_gone
        self._clock = clock
        self._grace_heartbeats = grace_heartbeats
        self._view: tuple[PoolInfo, ...] = ()
        self._registered = False
        self._wants_prompt_keys = False
        # The rest belongs to the thread.
        self._listed: tuple[PoolInfo, ...] = ()
        self._version = 0
        self._unsettled = True
        self._missing: tuple[PoolInfo, ...] = ()
        self._missing_until_s = 0.0
        messages = RegistrationMessages(
            name=f"pool={info.instance_id}",
            register=lambda: RegisterPool(info),
            heartbeat=lambda: PoolHeartbeat(info.epoch, self._version, tiers()),
            deregister=lambda: DeregisterPool(info.epoch),
            on_answer=self._on_answer,
        )
        self._registration = RouterRegistration(client, messages)
        self._registration.start()

    @property
    def registered(self) -> bool:
        """Whether a router has accepted this pool; it stays so while that router is away."""
        return self._registered

    @property
    def wants_prompt_keys(self) -> bool:
        """Whether the router wants the keys of prompts."""
        return self._wants_prompt_keys

    def pools(self) -> tuple[PoolInfo, ...]:
        """The other pools of any layout; a new tuple at each change."""
        return self._view

    def others(self, layout: str, *roles: Role) -> tuple[PoolInfo, ...]:
        """The pools that take blocks of `layout` (a hex digest) and have one of `roles`, or any role."""
        return tuple(
            info for info in self._view if info.layout in (layout, "") and (not roles or info.role in roles)
        )

    def prefill_at(self, bootstrap: str, layout: str) -> PoolInfo | None:
        """The pool of the prefill that requests name by `bootstrap`, if it has blocks of `layout`."""
        return next((info for info in self.others(layout, Role.PREFILL) if info.bootstrap == bootstrap), None)

    def close(self) -> None:
        """Deregister, if registered, and stop; the view stays. Takes at most a few seconds; idempotent."""
        self._registration.close()

    # ---- on the thread

    def _on_answer(self, answer: Message) -> float | None:
        if not isinstance(answer, Members):
            self._unsettled = True
            return None
        if self._unsettled:
            self._unsettled = False
            self._missing = self._view
            grace_s = self._grace_heartbeats * answer.heartbeat_s + ANSWER_TIMEOUT_S + RETRY_S
            self._missing_until_s = self._clock() + grace_s
        self._version = answer.version
        if answer.pools is not None:
            self._listed = tuple(info for info in answer.pools if info.epoch != self._info.epoch)
        self._registered = True
        self._wants_prompt_keys = answer.wants_prompt_keys
        self._update()
        return answer.heartbeat_s

    def _update(self) -> None:
        in_time = self._clock() < self._missing_until_s
        self._missing = tuple(info for info in self._missing if in_time and not _is_back(info, self._listed))
        before, view = self._view, self._listed + self._missing
        if view == before:
            return
        self._view = view
        there = {info.epoch for info in view}
        for info in before:
            if info.epoch not in there:
                logger.info("pool gone instance=%s epoch=%016x", info.instance_id, info.epoch)
                self._on_gone(info.epoch)


def _is_back(old: PoolInfo, listed: tuple[PoolInfo, ...]) -> bool:
    """Whether one of `listed` is `old` or its replacement."""
    return any(
        info.epoch == old.epoch
        or (info.instance_id, info.layout) == (old.instance_id, old.layout)
        or info.address == old.address
        for info in listed
    )
