"""What tests of a MemServe cluster need, shipped so that users' tests can have it too.

`cluster` starts real processes; `fake_worker` is a scripted SGLang server; `transport_conformance`
is the suite that every transport passes.
"""
