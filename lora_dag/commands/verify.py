"""Whether a file is what this repository makes now, what differs, and which revision makes it.

In: an exported file or an adapter.safetensors; params.yaml, data/, the base; git's history and DVC's experiments.
Out: lines on the terminal. Exit code 0 when the file is that of data/adapter and of params.yaml, else 2.
Run: ``lora-dag verify FILE``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.artifacts.adapter import FINAL, Adapter
from lora_dag.bases import resolve
from lora_dag.bases.layout import digests
from lora_dag.core.console import UserError, add_settings, as_path, log
from lora_dag.core.files import from_json, sha256_file, understood
from lora_dag.core.params import Config, ModelParams, load
from lora_dag.core.tensors import load_metadata, load_tensors
from lora_dag.families.protocol import load_family
from lora_dag.pipeline.git import git
from stages.export.params import ExportParams

if TYPE_CHECKING:
    from lora_dag.core.params import Params

METRICS = "reports/train/metrics.json"
"""Names the adapter of a revision by the first 16 digits of its sha256."""
BY_TRAIN = (".lora_A.", ".lokr_", ".hada_")
"""In the names of an adapter's tensors as train writes them, in a file without a header of ours."""
OF_TRAINING = ("lora", "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, ["adapter"])
    parser.add_argument("file", type=as_path, metavar="FILE", help="an exported file, or an adapter.safetensors")


def main(args: argparse.Namespace) -> None:
    verify(args.file, load(args.params, args.overrides), args.adapter)


def verify(file: Path, config: Config, adapter_folder: Path) -> None:
    """Log what the file was made from.

    Raises:
        UserError: it is damaged, not one of ours, or of another state: a line per difference, and who makes it.
    """
    record = read(file)
    digest = record["adapter"]
    found = differences(record, config, adapter_folder)
    revision = made_by(digest)
    log.info("file        %s: adapter %s", file, digest[:16])
    for name in ("step", "num_steps", "num_pictures", "family"):
        if name in record:
            log.info("%-11s %s", name, record[name])
    where = (
        f"{revision[:12]}: git checkout {revision[:12]} && dvc repro" if revision else "no commit or experiment here"
    )
    log.info("made by     %s", where)
    if found:
        raise UserError(*(f"{file}: {line}" for line in found))
    log.info("verified    the file is that of %s and of params.yaml", adapter_folder)


def read(file: Path) -> dict[str, Any]:
    """What the header says, its tensors checked.

    Raises:
        UserError: no such file, no safetensors, changed since it was written, or not one of ours.
    """
    from safetensors import SafetensorError

    from lora_dag.adapters.adapter_tensors import tensors_digest

    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        fields, tensors = load_metadata(file), load_tensors(file)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged, or no safetensors file ({error})") from None
    if "lora_dag" in fields:
        if fields.get("modelspec.hash_sha256") != f"0x{tensors_digest(tensors)}":
            raise UserError(f"{file}: its tensors were changed after it was written")
        with understood(file, "stages.export"):
            return dict(from_json(fields["lora_dag"]))
    if any(mark in name for mark in BY_TRAIN for name in tensors):
        return {"adapter": sha256_file(file)}
    raise UserError(
        f"{file}: has no header of this project (lora_dag), which exports of an adapter have and merged ones do not"
    )


def differences(record: dict[str, Any], config: Config, adapter_folder: Path) -> list[str]:
    """A line for each thing that is not as the file says, the nearest causes last."""
    found = []
    if (adapter_folder / "adapter.json").exists():
        own = Adapter.load(adapter_folder).files[FINAL]
        if own != record["adapter"]:
            found.append(f"its adapter is {record['adapter'][:16]}, {adapter_folder} holds {own[:16]}")
    else:
        found.append(f"{adapter_folder} is empty; run `dvc repro`, then compare again")
    model = config.section(ModelParams)
    if "base" in record:
        family = load_family(model.family)
        base = digests(resolve.resolve(model, family, make=False).model, family.COMPONENTS)
        changed = sorted(name for name, digest in base.items() if record["base"].get(name) != digest)
        if changed:
            found.append(f"made with another {', '.join(changed)} than model.pretrained holds now")
    if "num_steps" in record:
        made, asked = (step or record["num_steps"] for step in (record.get("step"), config.section(ExportParams).step))
        if made != asked:
            found.append(f"made of the adapter at step {made}, params.yaml export.step asks for {asked}")
    for name in OF_TRAINING:
        if name in record:
            found += setting_differences(name, record[name], config.sections[name])
    return found


def setting_differences(section: str, recorded: Mapping[str, Any], own: Params) -> Iterator[str]:
    values = own.model_dump()
    for key, value in sorted(recorded.items()):
        if key in values and values[key] != value:
            yield f"made with {section}.{key} {value}, params.yaml says {values[key]}"


def made_by(digest: str) -> str:
    """The newest commit or experiment whose metrics name the adapter; empty where there is none."""
    refs = words("for-each-ref", "--format=%(objectname)", "refs/heads", "refs/tags", "refs/remotes", "refs/exps")
    for revision in words("log", "--format=%H", *dict.fromkeys(refs), "--", METRICS) if refs else []:
        try:
            recorded = dict(from_json(git("show", f"{revision}:./{METRICS}") or "{}"))
        except (TypeError, ValueError):
            continue
        if recorded.get("train.adapter_digest") == digest[:16]:
            return revision
    return ""


def words(*arguments: str) -> list[str]:
    return (git(*arguments) or b"").decode().split()
