"""One request: checked, sent to its servers, tried again, its answers merged."""
