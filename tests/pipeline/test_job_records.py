"""Records of finished jobs, where and as Snakemake itself would write them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from snakemake.persistence.file import FilePersistence

from lora_dag.pipeline.snakemake_records import METADATA, accept_code, read_record, recorded_paths
from tests.helpers.errors import refused

CODE = "c" * 64
JOB = {
    "rule": "train",
    "incomplete": False,
    "params": ["'--set lora.rank=4 --adapter runs/raw/rank-4-s0/adapter'", repr(CODE), "3", "{'lora': {'rank': 4}}"],
    "input": ["data/base/unet.safetensors", "runs/raw/latents/manifest.json"],
    "input_checksums": {"runs/raw/latents/manifest.json": f"sha256:{'a' * 64}"},
    "starttime": 1.5,
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    METADATA.mkdir(parents=True)


def write(path: str, **changes: Any) -> Path:
    """The file, and its record at the place that Snakemake's own code gives."""
    persistence = object.__new__(FilePersistence)
    persistence._max_len = None
    place = Path(persistence._record_path(str(METADATA), path))
    for file, text in ((place, json.dumps(JOB | changes)), (Path(path), "")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return place


@pytest.mark.parametrize("name_max", [255, 143])
@pytest.mark.parametrize("length", [20, 106, 107, 108, 189, 190, 191, 192, 500])
def test_a_record_is_found_whatever_the_length_of_the_path(
    length: int, name_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of runs may have 160 characters, and eCryptfs takes names of 143."""
    monkeypatch.setattr(os, "pathconf", lambda path, name: name_max)
    path = "/".join(["runs"] + ["x" * 100] * 5)[:length].rstrip("/")
    write(path)
    record = read_record(path)
    assert record and record.path == path


def test_what_a_job_ran_with() -> None:
    write("runs/adapter.json")
    record = read_record("runs/adapter.json")
    assert record
    assert (record.code, record.results, record.sections) == (CODE, 3, {"lora": {"rank": 4}}) and record.started == 1.5
    assert record.overrides == ["lora.rank=4"] and record.folder("adapter") == "runs/raw/rank-4-s0/adapter"
    large, small = "data/base/unet.safetensors", "runs/raw/latents/manifest.json"
    assert record.inputs == {large: None, small: "a" * 64}


def test_a_record_from_before_there_were_numbers_has_none() -> None:
    write("runs/adapter.json", params=[param for param in JOB["params"] if param != "3"])
    record = read_record("runs/adapter.json")
    assert record and (record.code, record.results) == (CODE, None)


def test_no_record_of_a_job_that_did_not_finish_or_of_a_file_that_is_gone() -> None:
    write("runs/a.json", incomplete=True)
    write("runs/b.json")
    Path("runs/b.json").unlink()
    assert read_record("runs/a.json") is read_record("runs/b.json") is read_record("runs/c.json") is None
    METADATA.rename("elsewhere")
    assert read_record("runs/a.json") is None


@pytest.mark.parametrize("changes", [{"params": []}, {"params": ["f("]}, {"input_checksums": None}, {"input": 1}])
def test_a_record_of_another_snakemake_is_one_line(changes: dict[str, Any]) -> None:
    place = write("runs/a.json", **changes)
    with refused("record-damaged", str(place), "runs/a.json", "`snakemake`"):
        read_record("runs/a.json")
    place.write_text("{")
    with refused("record-damaged", str(place)):
        read_record("runs/a.json")


def test_a_record_takes_other_code_and_nothing_else() -> None:
    """Snakemake compares the parameters as a set of texts."""
    path = "runs/" + "x" * 200 + "/adapter.json"
    place = write(path)
    assert list(recorded_paths()) == [path]
    record = read_record(path)
    assert record
    accept_code(record, "b" * 64, 3)
    changed = json.loads(place.read_text())
    assert set(changed["params"]) == {JOB["params"][0], repr("b" * 64), "3", JOB["params"][-1]}
    assert changed | {"params": 0} == JOB | {"params": 0}
