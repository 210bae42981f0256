"""Comparisons measured side by side; results in RESULTS.md."""
