"""The class tree of errors, and its diagram."""

from __future__ import annotations

import inspect

import pytest

from memserve.core import errors
from memserve.core.ids import new_epoch


def drawn_tree() -> dict[str, str]:
    """Each error in the diagram of the module's docstring, with its parent."""
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


def test_error_diagram_equals_the_class_tree() -> None:
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
def test_errors_have_fields_and_name_them_in_their_text(error: Exception, fields: dict[str, object]) -> None:
    assert {name: getattr(error, name) for name in fields} == fields
    assert "\n" not in str(error)
    assert str(error)


def test_stale_epoch_error_names_both_epochs() -> None:
    assert "gone" in str(errors.StaleEpoch("p", 1, None))
    assert "000000000000002a" in str(errors.StaleEpoch("p", 1, 42))


def test_epochs_are_positive_and_fit_63_bits() -> None:
    epochs = [new_epoch() for _ in range(1000)]
    assert len(set(epochs)) == 1000
    assert all(0 < epoch < 2**63 for epoch in epochs)
