"""Comparisons measured side by side: `python -m bench`; results in RESULTS.md."""
