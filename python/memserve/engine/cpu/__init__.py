"""The CPU platform: runs SGLang without a GPU."""
