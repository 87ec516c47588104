"""Where a request goes, whether its history is fetched first, and what came of it."""
