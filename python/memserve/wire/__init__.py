"""The control plane: every message (`messages`) and the links that carry them (`link`)."""
