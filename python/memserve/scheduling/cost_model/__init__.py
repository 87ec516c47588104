"""The costs of work: the model, first guesses, and the online fit. Pure, except that `file` reads files."""
