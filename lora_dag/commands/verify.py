"""Compares a file with data/adapter and params.yaml, and finds the revision that made it.

In: an exported file or an adapter.safetensors; params.yaml, data/, the base; git's history and DVC's experiments.
Out: lines on the terminal. Exit code 0 if the file matches data/adapter and params.yaml, otherwise 2.
Run: ``lora-dag verify FILE``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.artifacts.adapter import FINAL, Adapter
from lora_dag.bases import component_files, resolve
from lora_dag.core.console import Problem, UserError, add_settings, as_path, log
from lora_dag.core.files import artifact_errors, from_json, missing_file, sha256_file
from lora_dag.core.params import Config, ModelParams, load
from lora_dag.core.tensors import load_metadata, load_tensors
from lora_dag.families.protocol import load_family
from lora_dag.pipeline.git import git
from stages.export.params import ExportParams

if TYPE_CHECKING:
    from lora_dag.core.params import Params

METRICS = "reports/train/metrics.json"
"""Metrics of train, with the first 16 digits of the adapter's sha256."""
ADAPTER_MARKS = (".lora_A.", ".lokr_", ".hada_")
"""Parts of the tensor names of an adapter that train wrote; such a file has no header of lora-dag."""
TRAINING_SECTIONS = ("lora", "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, ["adapter"])
    parser.add_argument("file", type=as_path, metavar="FILE", help="an exported file or an adapter.safetensors")


def main(args: argparse.Namespace) -> None:
    verify(args.file, load(args.params, args.overrides), args.adapter)


def verify(file: Path, config: Config, adapter_folder: Path) -> None:
    """Log the provenance of the file.

    Raises:
        UserError: the file is damaged, not from lora-dag, or differs from data/adapter and params.yaml: a problem per
            difference.
    """
    record = read_provenance(file)
    digest = record["adapter"]
    problems = differences(record, config, adapter_folder)
    revision = find_revision(digest)
    log.info("file        %s: adapter %s", file, digest[:16])
    for name in ("step", "num_steps", "num_images", "family"):
        if name in record:
            log.info("%-11s %s", name, record[name])
    origin = (
        f"{revision[:12]}: git checkout {revision[:12]} && dvc repro" if revision else "no commit or experiment here"
    )
    log.info("made by     %s", origin)
    if problems:
        raise UserError(*(problem.at(str(file)) for problem in problems))
    log.info("verified    the file matches %s and %s", adapter_folder, config.source)


def read_provenance(file: Path) -> dict[str, Any]:
    """Return the provenance record in the file's header, after a check of its tensors.

    Raises:
        UserError: the file is missing, damaged, changed since it was written, or not from lora-dag.
    """
    from safetensors import SafetensorError

    from lora_dag.adapters.adapter_tensors import tensors_digest

    if not file.is_file():
        raise UserError(missing_file(file))
    try:
        fields, tensors = load_metadata(file), load_tensors(file)
    except SafetensorError as error:
        raise UserError(Problem("adapter-damaged", f"{file}: damaged, or no safetensors file ({error}).")) from None
    if "lora_dag" in fields:
        if fields.get("modelspec.hash_sha256") != f"0x{tensors_digest(tensors)}":
            text = f"{file}: its tensors were changed after it was written. Export the adapter again."
            raise UserError(Problem("adapter-changed", text))
        with artifact_errors(file, "stages.export"):
            return dict(from_json(fields["lora_dag"]))
    if any(mark in name for mark in ADAPTER_MARKS for name in tensors):
        return {"adapter": sha256_file(file)}
    text = f"{file}: no lora_dag header, so its origin is unknown. Choose an exported adapter; merged models have none."
    raise UserError(Problem("no-provenance", text))


def differences(record: dict[str, Any], config: Config, adapter_folder: Path) -> list[Problem]:
    """Return a problem per difference between a file's record and the present files and settings."""
    problems = []
    if (adapter_folder / "adapter.json").exists():
        own = Adapter.load(adapter_folder).files[FINAL]
        if own != record["adapter"]:
            text = f"its adapter is {record['adapter'][:16]}, but {adapter_folder} holds {own[:16]}."
            problems.append(Problem("other-adapter", text))
    else:
        problems.append(Problem("adapter-missing", f"{adapter_folder} is empty. Run `dvc repro`, then compare again."))
    model = config.section(ModelParams)
    if "base" in record:
        family = load_family(model.family)
        base = component_files.digests(resolve.resolve(model, family, make=False).model, family.COMPONENTS)
        changed = sorted(name for name, digest in base.items() if record["base"].get(name) != digest)
        if changed:
            text = f"made with another {', '.join(changed)} than {model.setting('pretrained')} has now."
            problems.append(Problem("base-changed", text))
    if "num_steps" in record:
        export = config.section(ExportParams)
        made, requested = (step or record["num_steps"] for step in (record.get("step"), export.step))
        if made != requested:
            text = f"made of the adapter at step {made}, but {export.setting('step')} selects {requested}."
            problems.append(Problem("other-step", text))
    for name in TRAINING_SECTIONS:
        if name in record:
            problems += setting_differences(name, record[name], config.sections[name])
    return problems


def setting_differences(section: str, recorded: Mapping[str, Any], own: Params) -> Iterator[Problem]:
    """Yield a problem per setting of a section whose value differs from the recorded one."""
    values = own.model_dump()
    for key, value in sorted(recorded.items()):
        if key in values and values[key] != value:
            text = f"made with {section}.{key} {value}, but {own.setting(key)} is {values[key]}."
            yield Problem("other-setting", text)


def find_revision(digest: str) -> str:
    """Return the newest commit or experiment whose metrics have the adapter's digest; empty for none."""
    refs = git_words("for-each-ref", "--format=%(objectname)", "refs/heads", "refs/tags", "refs/remotes", "refs/exps")
    for revision in git_words("log", "--format=%H", *dict.fromkeys(refs), "--", METRICS) if refs else []:
        try:
            recorded = dict(from_json(git("show", f"{revision}:./{METRICS}") or "{}"))
        except (TypeError, ValueError):
            continue
        if recorded.get("train.adapter_digest") == digest[:16]:
            return revision
    return ""


def git_words(*arguments: str) -> list[str]:
    """Return the words of git's output; empty if git fails."""
    return (git(*arguments) or b"").decode().split()
