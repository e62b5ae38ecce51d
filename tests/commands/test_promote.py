"""Runs of a sweep adopted by DVC, on stages that write their settings only; the last test trains in earnest."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_dag.pipeline.yaml_edit import with_values
from tests.helpers.checkout import Checkout, ran
from tests.helpers.errors import assert_line
from tests.helpers.workspace import REPOSITORY, make_image

SWEEP = ["--config", "grid={lora.rank: [4]}"]
RUN = "raw/rank-4-s0"

# Takes the place of `python` on PATH: writes all outputs that dvc.yaml lists, with what the stage reads as content.
STUB = """#!{python}
import hashlib, json, os, pathlib, sys
sys.path.insert(0, os.getcwd())
from lora_dag.bases.component_files import digests
from lora_dag.core.console import PATHS
from lora_dag.core.params import ModelParams, load
from lora_dag.families.protocol import load_family
from lora_dag.commands.promote import path_in_run
from lora_dag.pipeline.dvc_files import read_pipeline
stage = sys.argv[2].removeprefix("stages.")
pairs = list(zip(sys.argv[3::2], sys.argv[4::2]))
options = {{name[2:].replace("-", "_"): value for name, value in pairs}}
config = load(pathlib.Path(options.get("params", "params.yaml")), [value for name, value in pairs if name == "--set"])
sections = {{name.partition(".")[0] for name in read_pipeline()[stage].params["params.yaml"]}}
text = json.dumps({{name: config.sections[name].model_dump() for name in sorted(sections)}}, default=str)
def write(path, content=text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
for path in read_pipeline()[stage].outs:
    place = pathlib.Path(path_in_run(path, PATHS | options))
    if "." in place.name:
        write(place)
    else:
        for name in {{"prepare": ["manifest.jsonl", "dataset.json"], "cache_latents": ["manifest.json"],
                     "train": ["adapter.safetensors", "snapshots/step-000002.safetensors"],
                     "export": ["diffusers/pytorch_lora_weights.safetensors",
                     "peft/adapter_model.safetensors", "comfyui/ink-icons.safetensors"]}}[stage]:
            write(place / name)
sha256 = hashlib.sha256(text.encode()).hexdigest()
if stage == "train":
    write(pathlib.Path(options.get("adapter", "data/adapter"), "adapter.json"),
          json.dumps({{"files": {{"adapter.safetensors": sha256, "snapshots/step-000002.safetensors": sha256}}}}))
    write(pathlib.Path(options.get("train_reports", "reports/train"), "run.json"), text)
if stage == "export":
    model = config.section(ModelParams)
    base = digests(model, load_family(model.family).COMPONENTS)
    files = {{"peft/adapter_model.safetensors": {{"sha256": sha256}}}}
    write(pathlib.Path(options.get("export_reports", "reports/export"), "lineage.json"),
          json.dumps([["base", base], ["files", files]]))
"""


class Stubbed(Checkout):
    """A checkout where every stage takes a moment; a sweep is done beside what DVC has."""

    def __init__(self, path: Path, base: Path) -> None:
        folder = path.with_name("bin")
        folder.mkdir()
        (folder / "python").write_text(STUB.format(python=sys.executable))
        (folder / "python").chmod(0o755)
        self.stubs = folder
        super().__init__(path, base)

    @property
    def environment(self) -> dict[str, str]:
        plain = super().environment
        return plain | {"PATH": f"{self.stubs}{os.pathsep}{plain['PATH']}"}

    def promote(self, name: str = RUN) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "lora_dag", "promote", name, check=False)

    def refusal(self, name: str = RUN) -> str:
        """What it says; nothing in git changes by it."""
        before = self.git("status", "--porcelain")
        done = self.promote(name)
        assert done.returncode == 2 and not done.stdout, done.stdout + done.stderr
        assert self.git("status", "--porcelain") == before
        return done.stderr

    def back(self) -> None:
        self.git("checkout", "--quiet", "--", ".")
        self.dvc("checkout", "--force", "--quiet")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Stubbed:
    """After `dvc repro` of rank 2, committed, and a sweep of rank 4 alone."""
    checkout = Stubbed(tmp_path_factory.mktemp("promote") / "checkout", tiny_base)
    checkout.dvc("repro")
    checkout.commit("reproduced")
    checkout.snakemake(*SWEEP)
    return checkout


@pytest.fixture(autouse=True)
def put_back(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "swept" in request.fixturenames:
        swept: Stubbed = request.getfixturevalue("swept")
        swept.back()
        assert swept.git("status", "--porcelain") == ""


def test_a_run_is_adopted_without_running_and_going_back_restores(swept: Stubbed) -> None:
    before = (swept.path / "data/adapter/adapter.safetensors").read_bytes()
    done = swept.promote()
    assert done.returncode == 0, done.stderr
    assert "params      lora.rank 4\n" in done.stdout
    adopted = (swept.path / "data/adapter/adapter.safetensors").read_bytes()
    assert adopted == (swept.path / f"runs/{RUN}/adapter/adapter.safetensors").read_bytes() != before
    changed = swept.git("diff", "--unified=0", "params.yaml").splitlines()[-2:]
    assert [line.partition("#")[0].rstrip() for line in changed] == ["-  rank: 2", "+  rank: 4"]
    assert "Data and pipelines are up to date." in swept.dvc("status")
    assert not list(swept.path.glob("data/**/.snakemake_timestamp"))
    assert "lora" in (swept.path / "reports/train/run.json").read_text()

    swept.git("checkout", "--quiet", "params.yaml")
    assert ran(swept.dvc("repro")) <= {"report"}  # the others from the run cache
    assert (swept.path / "data/adapter/adapter.safetensors").read_bytes() == before
    swept.set(lora__rank=4)
    assert ran(swept.dvc("repro")) <= {"report"}  # the adopted run is in the run cache too
    assert (swept.path / "data/adapter/adapter.safetensors").read_bytes() == adopted


@pytest.mark.slow
def test_stopped_in_the_middle_the_same_command_finishes(swept: Stubbed) -> None:
    journal = swept.path / ".state/promote/journal.json"
    journal.parent.mkdir(parents=True, exist_ok=True)
    journal.write_text(json.dumps({"run": "raw/rank-2-s0"}))
    assert_line(swept.refusal(), "promotion-unfinished", f"error: {RUN}: ", "`lora-dag promote raw/rank-2-s0`")
    journal.write_text(json.dumps({"run": RUN}))  # as a kill after the first copy leaves it
    (swept.path / "data/adapter/adapter.safetensors").unlink()
    (swept.path / "data/adapter/adapter.safetensors").write_text("half")
    done = swept.promote()
    assert done.returncode == 0 and "resumed     a promotion that was stopped" in done.stdout
    assert "Data and pipelines are up to date." in swept.dvc("status")
    assert not journal.exists()


def test_outputs_that_dvc_has_no_copy_of_are_not_overwritten(swept: Stubbed) -> None:
    path = swept.path / "data/adapter/adapter.safetensors"
    path.unlink()
    path.write_text("trained for days")
    assert_line(swept.refusal(), "outputs-unsaved", "data/adapter", "train", "`dvc commit`", "`dvc checkout`")
    assert path.read_text() == "trained for days"


def test_runs_of_other_parameters_code_images_or_base_are_refused(swept: Stubbed) -> None:
    """All at once, each by name."""
    swept.set(lora__alpha=7)
    code = swept.path / "stages/export/header.py"
    code.write_text(code.read_text() + "\n# edited\n")
    image = swept.path / "data/raw/00.png"
    original = image.read_bytes()
    image.unlink()
    make_image(100).save(image)
    config = swept.path / "data/base/scheduler/scheduler_config.json"
    scheduler = config.read_text()
    config.unlink()
    config.write_text(scheduler + " ")
    adapter = swept.path / f"runs/{RUN}/adapter/adapter.safetensors"
    trained = adapter.read_bytes()
    adapter.write_bytes(b"damaged")
    more = swept.path / "data/raw/more.png"
    make_image(101).save(more)
    said = swept.refusal()
    for part in (
        "made with lora.alpha 2.0, params.yaml has 7.0. Run `snakemake` again, or undo the change.",
        "made with other code of export of equal RESULTS (`lora-dag relock` accepts it). Run",
        "data/raw/00.png, an input of prepare, has changed",
        "data/raw has new files (data/raw/more.png)",
        "made with another base model than data/base (scheduler)",
        f"runs/{RUN}/adapter/adapter.safetensors is missing or damaged",
    ):
        assert f"error: {RUN}: {part}" in said
    more.unlink()
    for path, content in ((image, original), (config, scheduler.encode()), (adapter, trained)):
        path.write_bytes(content)


def test_the_leaderboard_ranks_no_run_that_would_be_made_otherwise_now(swept: Stubbed) -> None:
    """As after a sweep that failed early, once a parameter, an image or a stage's code was edited."""

    def reason() -> str:
        swept.python("-m", "lora_dag", "leaderboard", "--set", "sweep.grid={lora.rank: [4]}")
        return (swept.path / "reports/sweep/leaderboard.md").read_text()

    assert "undo the change" not in reason()  # the stand-ins write no reports that could be read
    swept.set(dataset__heldout_fraction=0.4)
    code = swept.path / "stages/export/header.py"
    code.write_text(code.read_text() + "\n# edited\n")
    page = reason().replace("'", "`")
    assert "made with dataset.heldout_fraction 0.25, params.yaml has 0.4, made with other code of export" in page
    swept.back()
    manifest = swept.path / "runs/raw/latents/manifest.json"
    latents = manifest.read_bytes()
    manifest.write_bytes(b"{}")
    page = reason()
    for stage in ("train", "validate"):
        assert f"runs/raw/latents/manifest.json, an input of {stage}, has changed" in page
    manifest.write_bytes(latents)


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        (f"runs/{RUN}/adapter/adapter.json", "[]", "artifact-damaged"),
        (f"runs/{RUN}/reports/export/lineage.json", "{}", "artifact-damaged"),
        (".state/promote/journal.json", "[]", "journal-damaged"),
    ],
)
def test_files_of_another_kind_are_one_line(swept: Stubbed, name: str, text: str, code: str) -> None:
    path = swept.path / name
    before = path.read_bytes() if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    said = swept.refusal()
    assert said.count("\n") == 1
    assert_line(said, code, f"error: {name}: ", "Delete it")
    path.unlink() if before is None else path.write_bytes(before)


def test_unknown_and_unfinished_runs_are_refused(swept: Stubbed) -> None:
    assert_line(swept.refusal("raw/rank-44-s0"), "run-missing", "error: raw/rank-44-s0: ", RUN)
    report = swept.path / f"runs/{RUN}/reports/report.md"
    text = report.read_bytes()
    report.unlink()
    assert_line(swept.refusal(), "run-unfinished", f"error: {RUN}: ", "report.md", "`snakemake`")
    report.write_bytes(text)


@pytest.mark.slow
def test_the_adopted_files_are_those_that_dvc_would_have_made(tmp_path: Path, tiny_base: Path) -> None:
    checkout = Checkout(tmp_path / "checkout", tiny_base)
    checkout.snakemake("--config", "grid={lora.rank: [4]}")
    checkout.python("-m", "lora_dag", "promote", f"runs/{RUN}")
    assert "Data and pipelines are up to date." in checkout.dvc("status")
    checkout.commit("promoted")
    checkout.dvc("repro", "--force", "--no-run-cache")
    assert checkout.git("status", "--porcelain") == ""


def test_values_are_changed_in_place() -> None:
    text = (REPOSITORY / "params.yaml").read_text(encoding="utf-8")
    changes = {"lora.rank": 16, "model.variant": "fp16", "train.learning_rate": 1e-5, "dataset.instance_prompt": "a: b"}
    changed = with_values(text, changes)
    lines = [(a, b) for a, b in zip(text.splitlines(), changed.splitlines(), strict=True) if a != b]
    assert [re.sub(r" +#.*", "", b) for _, b in lines] == [
        "  variant: fp16",
        '  instance_prompt: "a: b"',
        "  rank: 16",
        "  learning_rate: 1e-05",
    ]
    assert all(a.partition("#")[2] == b.partition("#")[2] for a, b in lines)
