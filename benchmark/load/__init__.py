"""Load on any server that speaks SGLang's `/generate`: what is sent, when, and what came of it.

Knows neither how servers are started (`systems`) nor what is asked of them (`workloads`).
"""
