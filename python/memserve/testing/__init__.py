"""Tools for tests of a MemServe cluster, shipped for users' own tests.

`cluster` starts real processes; `fake_worker` is a scripted SGLang server; `transport_conformance`
is the suite that every transport passes.
"""
