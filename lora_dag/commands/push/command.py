"""What was exported, the model card and the sample sheet, uploaded to the Hugging Face Hub.

In: data/export, reports/, params.yaml export.push_to_hub.  Out: one commit there, or none where nothing differs.
A command and not a stage: a stage's result can come from DVC's run cache, which would upload nothing.
Run: ``dvc repro && lora-dag push``
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_dag.artifacts import lineage, model_card, picture_table
from lora_dag.artifacts.adapter import FINAL, Adapter
from lora_dag.commands.push.hub import upload
from lora_dag.commands.verify import differences, setting_differences
from lora_dag.core.console import UserError, add_settings, log
from lora_dag.core.files import sha256_file
from lora_dag.core.params import Config, load
from lora_dag.pages import words
from stages.export.params import ExportParams

SHEET = "samples.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, ["adapter", "export", "export_reports", "reports"])


def main(args: argparse.Namespace) -> None:
    config = load(args.params, args.overrides)
    push(config, args.adapter, args.export, args.export_reports, args.reports)


def push(config: Config, adapter: Path, export: Path, export_reports: Path, reports: Path) -> None:
    """Upload what the repository does not hold yet.

    Raises:
        UserError: no repository is named; something is not of params.yaml as it stands; no token; the Hub's refusal.
    """
    target = config.section(ExportParams).push_to_hub
    if target is None:
        raise UserError("params.yaml export.push_to_hub: null; set it to {repo_id: user/name, private: true}")
    require_current(config, adapter, export, export_reports, reports)
    files = {"README.md": reports / model_card.NAME, SHEET: reports / SHEET} | files_below(export)
    upload(target, files, f"Adapter {Adapter.load(adapter).files[FINAL][:16]}")


def require_current(config: Config, adapter: Path, export: Path, export_reports: Path, reports: Path) -> None:
    """Raises UserError with a line for everything that is not of the one run that params.yaml describes."""
    needed = {export_reports / name: "export" for name in model_card.OF_EXPORT}
    needed |= {reports / name: "validate" for name in model_card.OF_REPORTS} | {reports / model_card.NAME: "report"}
    missing = [path for path in needed if not path.exists()]
    if missing:
        raise UserError(*(f"{path}: no such file; run `python -m stages.{needed[path]}` first" for path in missing))
    made, drawn = lineage.load(export_reports / "lineage.json"), lineage.load(reports / "validate/lineage.json")
    source = str(config.sections["dataset"].model_dump()["source"])
    config = config.replaced(config.section(ExportParams).with_words(source, made.get("caption", "")))
    found = [f"{export}: {line}" for line in differences(made, config, adapter)]
    found += [f"{export}: {line}" for line in settings("export", made, config)]
    found += changed_files(export, made["files"])
    if not made["adapter"].startswith(drawn["adapter"]):
        found.append(f"{reports / SHEET}: its adapter is {drawn['adapter']}, {export} holds {made['adapter'][:12]}")
    found += [f"{reports / SHEET}: {line}" for line in settings("validate", drawn, config)]
    if mark(config, reports, export_reports) not in (reports / model_card.NAME).read_text(encoding="utf-8"):
        found.append(f"{reports / model_card.NAME}: written for other reports or settings than stand here")
    table = reports / "dataset/pictures.csv"
    captions = [row["captions"] for row in picture_table.load(table)] if table.exists() else []
    if strange := words.strangers(drawn["validate"]["prompts"], captions):
        log.warning("warning: %s", strange)
    if found:
        raise UserError(*found, "nothing was uploaded: run `dvc repro`, then push again")


def settings(section: str, made: dict[str, Any], config: Config) -> list[str]:
    return list(setting_differences(section, made[section], config.sections[section]))


def mark(config: Config, reports: Path, export_reports: Path) -> str:
    """Of the card that belongs to what stands there."""
    report, export, dataset = (config.sections[name].model_dump() for name in ("report", "export", "dataset"))
    caption = lineage.load(export_reports / "lineage.json").get("caption", "")
    title = words.title_of(report["title"], export, dataset["source"], caption)
    return model_card.mark(reports, export_reports, title, export["push_to_hub"]["repo_id"])


def files_below(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def changed_files(folder: Path, recorded: dict[str, Any]) -> list[str]:
    """A line for each file that is not as export wrote it."""
    there = files_below(folder)
    found = [f"{folder / name}: not written by export; move it elsewhere" for name in there if name not in recorded]
    found += [f"{folder / name}: no such file" for name in recorded if name not in there]
    both = [name for name in there if name in recorded]
    changed = [name for name in both if sha256_file(there[name]) != recorded[name]["sha256"]]
    return found + [f"{folder / name}: changed since it was written" for name in changed]
