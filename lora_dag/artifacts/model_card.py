"""reports/model_card.md: what report hands to a push, with a mark of what it was made from.

The mark is a comment that neither GitHub nor the Hub shows; a push compares it, so that no card goes up beside another
sample sheet, other metrics or other files than it tells of.
"""

from __future__ import annotations

from pathlib import Path

from lora_dag.core.files import sha256_file, sha256_json

NAME = "model_card.md"
OF_REPORTS = ("metrics.json", "samples.png", "validate/lineage.json")
OF_EXPORT = ("metrics.json", "lineage.json")


def mark(reports: Path, export_reports: Path, title: str, repo_id: str | None) -> str:
    """Of the reports that stand there and of the settings that the card repeats."""
    paths = [reports / name for name in OF_REPORTS] + [export_reports / name for name in OF_EXPORT]
    return f"<!-- made from {sha256_json([title, repo_id, [sha256_file(path) for path in paths]])[:16]} -->"
