"""reports/model_card.md: the model card that report writes and push uploads, with a fingerprint of its sources.

The fingerprint is a comment that neither GitHub nor the Hub shows. Push compares it, so that a card is uploaded only
with the samples, metrics and files that it describes.
"""

from __future__ import annotations

from pathlib import Path

from lora_dag.core.files import sha256_file, sha256_json

NAME = "model_card.md"
REPORT_FILES = ("metrics.json", "samples.png", "validate/lineage.json")
EXPORT_FILES = ("metrics.json", "lineage.json")


def fingerprint(reports: Path, export_reports: Path, title: str, repo_id: str | None) -> str:
    """Return the fingerprint of the reports and settings that the model card was generated from."""
    paths = [reports / name for name in REPORT_FILES] + [export_reports / name for name in EXPORT_FILES]
    return f"<!-- made from {sha256_json([title, repo_id, [sha256_file(path) for path in paths]])[:16]} -->"
