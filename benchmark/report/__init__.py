"""From what was measured to what a reader sees: statistics, verdicts, plots, one HTML file."""
