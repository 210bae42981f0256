"""What the documents repeat from the code stays equal to it."""

from pathlib import Path

from model.metrics import METRICS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_definitions_of_figures_are_those_of_the_code() -> None:
    text = (DOCS / "metrics.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `") and line.count("|") == 4]
    table = rows[: len(METRICS)]
    assert table == [f"| `{name}` | {metric.title} | {metric.definition} |" for name, metric in METRICS.items()]
