"""scripts/make_reference.py as a module."""

from __future__ import annotations

import importlib.util
import sys

from .pages import ROOT

_spec = importlib.util.spec_from_file_location("make_reference", ROOT / "scripts" / "make_reference.py")
assert _spec is not None
assert _spec.loader is not None
make_reference = importlib.util.module_from_spec(_spec)
sys.modules["make_reference"] = make_reference
_spec.loader.exec_module(make_reference)
parser_of = make_reference.parser_of
