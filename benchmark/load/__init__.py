"""Load on any server that speaks SGLang's `/generate`: plans, requests and records.

Knows neither how servers are started (`systems`) nor what is asked of them (`workloads`).
"""
