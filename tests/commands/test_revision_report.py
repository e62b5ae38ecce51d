"""Reports that a comparison cannot read: missing, damaged, or of another kind."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_dag.artifacts.lineage import load as load_lineage
from lora_dag.commands import explain
from lora_dag.commands.compare import revision_report
from lora_dag.core.console import UserError
from lora_dag.core.files import write_text
from tests.helpers.compared import IMAGE_TABLE, Repository, change_lineage
from tests.helpers.errors import refused


def test_a_damaged_table_is_one_line(repository: Repository) -> None:
    write_text(IMAGE_TABLE, "nonsense\n")
    with refused("report-damaged", "workspace: reports/dataset/images.csv", "`dvc repro`"):
        repository.run()


@pytest.mark.parametrize("read", [revision_report.read_revision, explain.read_lock], ids=["compare", "explain"])
def test_a_merge_conflict_in_the_settings_is_named(repository: Repository, read: Callable[[str], object]) -> None:
    """`dvc repro`, the advice for damaged files, cannot read such a file."""
    path = Path("params.yaml")
    write_text(Path("dvc.lock"), "stages: {}\n")
    write_text(path, "<<<<<<< HEAD\n" + path.read_text(encoding="utf-8"))
    with refused("merge-conflict-left", "workspace: params.yaml:1: ", "`git add`"):
        read("workspace")


HEAD = "row,file_name,split,timestep,base,adapter\n"


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("params.yaml", "lora: [", "workspace: params.yaml is damaged"),
        ("reports/metrics.json", "[]", "workspace: reports/metrics.json is damaged"),
        ("reports/validate/heldout.csv", "row,split\n", "workspace: reports/validate/heldout.csv is damaged"),
        ("reports/validate/lineage.json", "{}", "workspace: reports/validate/lineage.json is damaged"),
        ("reports/samples.png", "no PNG", "workspace: reports/samples.png is damaged"),
        ("params.yaml", "lora: {rank: .nan}\n", "workspace: params.yaml is damaged"),
        ("params.yaml", "lora: {rank: 2026-01-01}\n", "workspace: params.yaml is damaged"),
        ("params.yaml", "lora: &lora {rank: *lora}\n", "workspace: params.yaml is damaged"),
        ("params.yaml", "[" * 20_000, "workspace: params.yaml is damaged"),
        ("reports/metrics.json", "[" * 200_000, "workspace: reports/metrics.json is damaged"),
        ("reports/metrics.json", f'{{"val.loss": 1{"0" * 400}}}', "workspace: reports/metrics.json is damaged"),
        ("reports/validate/heldout.csv", HEAD + "x" * 200_000, "workspace: reports/validate/heldout.csv is damaged"),
        ("reports/validate/heldout.csv", HEAD.replace("\n", "\r") * 2, "workspace: reports/validate/heldout.csv is"),
    ],
)
def test_a_damaged_report_is_one_line(repository: Repository, path: str, text: str, message: str) -> None:
    write_text(Path(path), text)
    with pytest.raises(UserError) as error:
        repository.run()
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)
    assert str(error.value).startswith(message) and "`dvc repro`" in str(error.value)
    assert error.value.codes == ("report-damaged",)
    assert not list(Path("compare").glob("*"))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("validate", "prompts", None),
        ("validate", "prompts", [["red apple"]]),
        ("validate", "scales", "1.0"),
        ("validate", "scales", []),
        ("sheet", "cell", "64"),
        ("sheet", "cell", 0),
    ],
)
def test_lineage_of_another_kind_is_one_line(repository: Repository, section: str, key: str, value: Any) -> None:
    whole = load_lineage(Path("reports/validate/lineage.json"))
    change_lineage(**{section: whole[section] | {key: value}})
    with refused("report-damaged", "workspace: reports/validate/lineage.json", f"{section}.{key} is "):
        repository.run()


def test_a_sheet_that_is_too_small_or_too_large_is_damaged(repository: Repository) -> None:
    path = Path("reports/samples.png")
    whole = path.read_bytes()
    for width, height in ((1, 1), (100_000, 100_000)):  # the second by its header, as a decompression bomb has it
        Image.new("RGB", (1, 1)).save(path)
        head = b"IHDR" + struct.pack(">II", width, height) + path.read_bytes()[24:29]
        path.write_bytes(whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + path.read_bytes()[33:])
        with refused("report-damaged", "workspace: reports/samples.png", "`dvc repro`"):
            repository.run()


def test_workspace_without_reports(repository: Repository) -> None:
    Path("reports/metrics.json").unlink()
    with refused("revision-incomplete", "workspace: reports/metrics.json is missing", "`dvc repro`"):
        repository.run()


def test_parameters_of_any_depth_are_compared() -> None:
    tree: dict[str, Any] = {"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}
    assert revision_report.flatten(tree) == {"a.b.c": 1, "a.d": [1, 2], "e": None}
