"""The tree of errors, and its drawing."""

from __future__ import annotations

import inspect

import pytest

from memserve.core import errors
from memserve.core.ids import new_epoch


def drawn_tree() -> dict[str, str]:
    """Each error in the module's docstring and the one it hangs under."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        branch = line.lstrip("│ ")
        depth = (len(line) - len(branch)) // 4 + 1 if branch[:1] in ("├", "└") else 0
        if depth or line.startswith("MemServeError"):
            name = branch.lstrip("├└─ ").split()[0]
            if depth:
                parents[name] = path[depth - 1]
            path[depth:] = [name]
    return parents


def test_the_drawing_is_the_tree() -> None:
    actual = {
        name: one.__base__.__name__
        for name, one in inspect.getmembers(errors, inspect.isclass)
        if one is not errors.MemServeError and one.__base__ is not None
    }
    assert drawn_tree() == actual


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (errors.TransferTimeout("p", 1.5), {"peer": "p", "timeout_s": 1.5}),
        (errors.InstanceLost("p", "gone"), {"peer": "p", "reason": "gone"}),
        (errors.BadRequest("no", field="f", status=413), {"message": "no", "field": "f", "status": 413}),
        (errors.TransferFailed("p", "why"), {"peer": "p", "reason": "why"}),
        (errors.StaleEpoch("p", 1, None), {"peer": "p", "expected": 1, "actual": None}),
    ],
)
def test_errors_carry_fields_and_say_them(error: Exception, fields: dict[str, object]) -> None:
    assert {name: getattr(error, name) for name in fields} == fields
    assert "\n" not in str(error)
    assert str(error)


def test_a_stale_epoch_tells_the_two_lives_apart() -> None:
    assert "gone" in str(errors.StaleEpoch("p", 1, None))
    assert "000000000000002a" in str(errors.StaleEpoch("p", 1, 42))


def test_epochs_are_never_zero_and_fit_63_bits() -> None:
    epochs = [new_epoch() for _ in range(1000)]
    assert len(set(epochs)) == 1000
    assert all(0 < epoch < 2**63 for epoch in epochs)
