"""Settings of the prompt tree and its synchronization."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.core.flags import check_settings, setting


@dataclass(frozen=True, slots=True)
class TreeConfig:
    """Checked when built; raises ConfigError."""

    tree_budget_mib: int = setting(1024, "memory for the prompt tree, at 256 bytes per block", at_least=1)
    tree_audit_secs: float = setting(
        60.0, "time between two comparisons of the tree with what an instance holds", above=0
    )
    learnt_ttl_secs: float = setting(
        600.0, "time that the blocks of a server without cache events are assumed to stay cached", above=0
    )

    tree_audit_bytes_per_sec: int = setting(
        1 << 20,
        "keys compared per second, in bytes, over all instances: large caches are audited less often",
        metavar="BYTES",
        at_least=1,
    )
    max_snapshot_blocks: int = setting(
        1 << 22, "blocks of one snapshot of an instance; further ones are left out", at_least=1
    )
    event_keys: int = setting(
        1 << 20,
        "keys remembered by SGLang's event hash, at 250 bytes each; more if the tree has room for more than "
        "four times as many blocks",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check_settings(self)
