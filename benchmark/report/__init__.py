"""From measurements to the report: statistics, verdicts, plots, one HTML file."""
