"""What work costs: the model, where it begins, and what the router learns. Pure but for reading the file."""
