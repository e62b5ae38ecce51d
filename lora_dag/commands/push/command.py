"""Upload the exported files, the model card and the sample sheet to the Hugging Face Hub.

In: data/export, reports/, params.yaml export.push_to_hub.  Out: one commit on the Hub; none if nothing differs.
This is a command and no stage: DVC can restore a stage from its run cache, which would upload nothing.
Run: ``dvc repro && lora-dag push``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_dag.artifacts import image_table, lineage, model_card
from lora_dag.artifacts.adapter import FINAL, Adapter
from lora_dag.commands.push.hub import upload
from lora_dag.commands.verify import differences, setting_differences
from lora_dag.core.console import Problem, UserError, add_settings, warn
from lora_dag.core.files import sha256_file
from lora_dag.core.params import Config, load
from lora_dag.pages import default_texts
from stages.export.params import ExportParams

SHEET = "samples.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, ["adapter", "export", "export_reports", "reports"])


def main(args: argparse.Namespace) -> None:
    config = load(args.params, args.overrides)
    push(config, args.adapter, args.export, args.export_reports, args.reports)


def push(config: Config, adapter: Path, export: Path, export_reports: Path, reports: Path) -> None:
    """Upload the files that differ from the repository's.

    Raises:
        UserError: no repository is set, files do not belong to params.yaml, or the Hub refuses the upload.
    """
    settings = config.section(ExportParams)
    if settings.push_to_hub is None:
        text = "got null, but a repository is expected. Write {repo_id: user/name, private: true}."
        raise UserError(Problem("missing-setting", f"{settings.setting('push_to_hub')}: {text}"))
    require_current(config, adapter, export, export_reports, reports)
    files = {"README.md": reports / model_card.NAME, SHEET: reports / SHEET} | files_below(export)
    upload(settings, files, f"Adapter {Adapter.load(adapter).files[FINAL][:16]}")


def require_current(config: Config, adapter: Path, export: Path, export_reports: Path, reports: Path) -> None:
    """Check that all files belong to the run that params.yaml describes.

    Raises:
        UserError: one problem per file or setting that does not.
    """
    needed = {export_reports / name: "export" for name in model_card.EXPORT_FILES}
    needed |= {reports / name: "validate" for name in model_card.REPORT_FILES} | {reports / model_card.NAME: "report"}
    missing = [path for path in needed if not path.exists()]
    if missing:
        texts = [f"{path}: the file is missing. Run `python -m stages.{needed[path]}` first." for path in missing]
        raise UserError(*(Problem("file-missing", text) for text in texts))
    exported, validated = lineage.load(export_reports / "lineage.json"), lineage.load(reports / "validate/lineage.json")
    source = str(config.sections["dataset"].model_dump()["source"])
    config = config.replaced(config.section(ExportParams).with_words(source, exported.get("caption", "")))
    card, sheet = reports / model_card.NAME, reports / SHEET
    problems = at(export, differences(exported, config, adapter))
    problems += at(export, outdated_settings("export", exported, config))
    problems += changed_files(export, exported["files"])
    if not exported["adapter"].startswith(validated["adapter"]):
        problems.append(
            Problem(
                "other-adapter",
                f"{sheet}: it belongs to adapter {validated['adapter']}, but {export} to {exported['adapter'][:12]}.",
            )
        )
    problems += at(sheet, outdated_settings("validate", validated, config))
    if card_fingerprint(config, reports, export_reports) not in card.read_text(encoding="utf-8"):
        problems.append(Problem("card-outdated", f"{card}: it was written for other reports or settings."))
    table = reports / "dataset/images.csv"
    captions = [row["captions"] for row in image_table.load(table)] if table.exists() else []
    if unrelated := default_texts.unrelated_prompts(validated["validate"]["prompts"], captions):
        warn(unrelated.code, unrelated.at(config.sections["validate"].setting("prompts")))
    if problems:
        advice = "Nothing was uploaded. Run `dvc repro`, then `lora-dag push` again."
        raise UserError(*problems, Problem("nothing-uploaded", advice))


def at(path: Path, problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems with the path of a file before their texts."""
    return [problem.at(str(path)) for problem in problems]


def outdated_settings(section: str, recorded: dict[str, Any], config: Config) -> list[Problem]:
    """Return a problem per setting of a section that differs from the recorded one."""
    return list(setting_differences(section, recorded[section], config.sections[section]))


def card_fingerprint(config: Config, reports: Path, export_reports: Path) -> str:
    """Return the fingerprint of the model card that belongs to the present reports and settings."""
    report, export, dataset = (config.sections[name].model_dump() for name in ("report", "export", "dataset"))
    caption = lineage.load(export_reports / "lineage.json").get("caption", "")
    title = default_texts.page_title(report["title"], export, dataset["source"], caption)
    return model_card.fingerprint(reports, export_reports, title, export["push_to_hub"]["repo_id"])


def files_below(folder: Path) -> dict[str, Path]:
    """Return all files in a folder, by their relative name."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def changed_files(folder: Path, recorded: dict[str, Any]) -> list[Problem]:
    """Return a problem for each file that is extra, missing or changed since the export."""
    files = files_below(folder)
    extra = [name for name in files if name not in recorded]
    missing = [name for name in recorded if name not in files]
    changed = [name for name in files if name in recorded and sha256_file(files[name]) != recorded[name]["sha256"]]
    return [
        *(
            Problem("file-not-exported", f"{folder / name}: not written by export. Move it elsewhere.")
            for name in extra
        ),
        *(Problem("file-missing", f"{folder / name}: the file is missing.") for name in missing),
        *(Problem("file-changed", f"{folder / name}: the file was changed after the export.") for name in changed),
    ]
