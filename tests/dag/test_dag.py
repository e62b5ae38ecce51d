"""Promises of dvc.yaml and the Snakefile, read from the files: code dependencies, params sections, equal DAGs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lora_dag.core.clone import PROJECT
from lora_dag.core.console import PATHS
from lora_dag.core.params import SECTIONS, load, read_yaml
from lora_dag.pipeline import code
from lora_dag.pipeline.code import ROOT, command_digest, dependencies, digest, families, imported, is_code, stage_digest
from lora_dag.sweeps.grid import Run, plan
from stages.export.params import ExportParams
from tests.helpers.checkout import Checkout

STAGES = ("prepare", "cache_latents", "train", "validate", "export", "report")
READS = {
    "prepare": {"dataset"},
    "cache_latents": {"model", "cache"},
    "train": {"model", "lora", "train"},
    "validate": {"model", "validate"},
    "export": {
        "model",
        "dataset.source",
        *(f"export.{name}" for name in ExportParams.model_fields if name != "push_to_hub"),
    },
    "report": {
        "report.title",
        "model.family",
        "export.push_to_hub",
        "export.datasets",
        "dataset.source",
        "dataset.heldout_split",
    },
}
"""Sections, or keys one by one where a section has one that changes nothing."""


def settings(stage: dict[str, Any]) -> set[str]:
    """Keys of params.yaml."""
    return {name for name in stage["params"] if isinstance(name, str)}


def sections(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    return YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]


def outputs(stage: dict[str, Any]) -> list[str]:
    entries = [e for kind in ("outs", "metrics", "plots") for e in stage.get(kind, [])]
    return [next(iter(e)) if isinstance(e, dict) else e for e in entries]


def test_stages_are_the_six_of_the_readme(stages: dict[str, Any]) -> None:
    assert tuple(stages) == STAGES
    assert all(stage["cmd"] == f"python -m stages.{name}" for name, stage in stages.items())


@pytest.mark.parametrize("name", STAGES)
def test_code_dependencies_are_the_packages_that_imports_reach(stages: dict[str, Any], name: str) -> None:
    expected = dependencies(name)
    block = "\n".join(f"      - {path}" for path in expected)
    assert list(filter(is_code, stages[name]["deps"])) == expected, f"paste into dvc.yaml, stage {name}:\n{block}"


def test_a_package_that_dvc_does_not_list_is_found(tmp_path: Path) -> None:
    """Also where it is imported late, or by what a stage imports; what other stages use is no dependency."""
    for path in ("lora_dag", "stages"):
        shutil.copytree(ROOT / path, tmp_path / path)
    train = dependencies("train", tmp_path)
    assert "lora_dag/diffusion" in train and not {"lora_dag/pages", "lora_dag/commands", "stages/validate"} & {*train}
    with (tmp_path / "lora_dag/core/progress.py").open("a") as file:
        file.write("\n\ndef late() -> None:\n    from lora_dag.pages import markdown  # noqa: F401\n")
    assert dependencies("train", tmp_path) == sorted([*train, "lora_dag/pages"])


def test_no_family_imports_another() -> None:
    """dvc.yaml has one family's file alone, by its name."""
    files = {path.relative_to(ROOT).as_posix() for path in families()}
    assert len(files) >= 5
    for path in files:
        assert imported([ROOT / path]) & files == {path}


@pytest.mark.parametrize("name", STAGES)
def test_params_sections_and_the_number_of_the_results(stages: dict[str, Any], name: str) -> None:
    assert settings(stages[name]) == READS[name]
    assert [item for item in stages[name]["params"] if isinstance(item, dict)] == [
        {f"stages/{name}/__init__.py": ["RESULTS"]}
    ]


def test_every_section_is_read_by_a_stage_but_runtime_and_sweep(stages: dict[str, Any]) -> None:
    listed = sections(name for stage in stages.values() for name in settings(stage))
    assert set(read_yaml(ROOT / "params.yaml")) == set(SECTIONS) == listed | {"runtime", "sweep"}


@pytest.mark.parametrize("name", STAGES)
def test_stage_takes_only_the_sections_that_dvc_knows_of(name: str) -> None:
    """A section that the code reads and dvc.yaml does not list would leave stale results standing."""
    source = "".join(path.read_text() for path in (ROOT / "stages" / name).glob("**/*.py"))
    classes = {path.split(":")[1]: section for section, path in SECTIONS.items()}
    taken = {classes[cls] for cls in re.findall(r"\.section\((\w+)\)", source)}
    assert taken - {"runtime"} <= sections(READS[name])


def test_heavy_stages_keep_the_run_cache(stages: dict[str, Any]) -> None:
    """``outs`` with cache: false or persist: true would turn it off."""
    for name in ("prepare", "cache_latents", "train", "validate", "export"):
        assert all(isinstance(out, str) for out in stages[name].get("outs", [])), name


def test_both_dags_have_the_same_edges(stages: dict[str, Any], tiny_checkout: Checkout) -> None:
    dvc = {
        (producer, consumer)
        for consumer, stage in stages.items()
        for producer, other in stages.items()
        if set(stage["deps"]) & set(outputs(other))
    }
    graph = tiny_checkout.snakemake("--rulegraph", "dot", "--forceall")
    names = dict(re.findall(r'(\d+)\[label = "(\w+)"', graph))
    edges = {(names[a], names[b]) for a, b in re.findall(r"(\d+) -> (\d+)", graph)}
    assert {edge for edge in edges if "all" not in edge} == dvc


def test_both_dags_have_the_same_inputs_outputs_and_parameters(stages: dict[str, Any], tiny_checkout: Checkout) -> None:
    """Each path of dvc.yaml, moved to where the run keeps it, stands in its rule's job; code and sections as params."""
    (run,) = plan(read_yaml(tiny_checkout.path / "params.yaml"))
    rules = tiny_checkout.path / "rules"
    texts = {path: path.read_text(encoding="utf-8") for path in rules.glob("*.smk")}
    for path, text in texts.items():  # Snakemake prints a message or the files
        path.write_text(re.sub(r"^    message:\n.*\n", "", text, flags=re.MULTILINE), encoding="utf-8")
    jobs = jobs_of(tiny_checkout.snakemake("--dry-run", "--printshellcmds"))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    assert set(jobs) == {*STAGES, "all"}
    wanted = jobs.pop("all")["input"].split(", ")
    for name, job in jobs.items():
        inputs, made = job["input"].split(", "), job["output"].split(", ")
        for dep in (dep.removeprefix(PROJECT) for dep in stages[name]["deps"] if not is_code(dep)):
            assert any(is_within(file, moved(dep, run)) for file in inputs), f"rule {name} does not read {dep}"
        for out in outputs(stages[name]):
            assert any(is_within(file, moved(out, run)) for file in made), f"rule {name} does not name {out}"
        assert set(made) & set(wanted), f"rule all names no output of {name}"
        assert job["shell"].startswith(f"python -m stages.{name} --params ")
    for name in STAGES:
        assert f'**JOBS.params("{name}", ' in re.sub(r"\(\s+", "(", "".join(texts.values()))


def moved(path: str, run: Run) -> str:
    """A path of dvc.yaml where a run of Snakemake's has it."""
    path = re.sub(r"\$\{(.+)\}", lambda found: run.value(found[1]), path)
    within = [name for name, folder in PATHS.items() if is_within(path, folder)]
    if not within:  # dataset and base
        return path
    nearest = max(within, key=lambda name: len(PATHS[name]))
    return run.folders[nearest] + path.removeprefix(PATHS[nearest])


def is_within(file: str, path: str) -> bool:
    return file == path or file.startswith(f"{path}/")


def jobs_of(text: str) -> dict[str, dict[str, str]]:
    """Rule -> what a dry run prints of its one job."""
    found = {}
    for block in re.split(r"^(?:local)?rule ", text, flags=re.MULTILINE)[1:]:
        fields = dict(re.findall(r"^    (input|output): (.*)$", block, re.MULTILINE))
        shell = re.search(r"^Shell command: (.*)$", block, re.MULTILINE)
        found[block.partition(":")[0]] = fields | {"shell": shell[1] if shell else ""}
    return found


def test_snakemake_lints_clean(tiny_checkout: Checkout) -> None:
    assert "Congratulations" in tiny_checkout.snakemake("--lint")


def test_snakefile_is_formatted() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "snakefmt", "--check", "Snakefile", "rules"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["runs", "logs", "compare", "base/build", ".venv"])
def test_dvc_sees_all_of_a_dataset(tiny_checkout: Checkout, name: str) -> None:
    """A folder of images that DVC ignores could change without a stage running."""
    own, theirs = f"{name}/a.jpg", f"data/mine/{name}/a.jpg"
    ignored = tiny_checkout.run(sys.executable, "-m", "dvc", "check-ignore", own, theirs).stdout.split()
    assert ignored == [own]


def test_snakemake_refuses_braces_in_an_image_name(tiny_checkout: Checkout) -> None:
    path = tiny_checkout.path / "data/raw/{GUID}.png"
    path.write_bytes(b"")
    done = tiny_checkout.run(sys.executable, "-m", "snakemake", "--cores", "1", "--dry-run", check=False)
    path.unlink()
    assert "data/raw/{GUID}.png: Snakemake reads braces as wildcards. Rename the file." in done.stdout + done.stderr


def test_committed_params_are_valid() -> None:
    assert set(load(ROOT / "params.yaml").sections) == set(SECTIONS)


def test_committed_reports_belong_to_the_committed_parameters() -> None:
    """The gate of a pull request: dvc.lock, params.yaml, code and reports agree; no data is needed."""
    git = ["git", "status", "--porcelain", "--untracked-files=no"]
    if subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout:
        pytest.skip("the working tree has uncommitted changes")
    gate = [sys.executable, "-m", "dvc", "repro", "--dry", "--allow-missing"]
    done = subprocess.run(gate, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Data and pipelines are up to date." in done.stdout, done.stdout + done.stderr


def test_snakemake_s_digest_is_of_the_code_that_dvc_lists(
    stages: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees new files and the loss maths, which is imported late; not other stages, other families or leftovers."""
    for path in ("lora_dag", "stages"):
        shutil.copytree(ROOT / path, tmp_path / path)
    monkeypatch.chdir(tmp_path)
    before = digest(stages["train"]["deps"], "sd")
    for name, changes in (
        ("lora_dag/diffusion/objectives.py", True),
        ("lora_dag/families/sd.py", True),
        ("stages/train/new.py", True),
        ("lora_dag/families/flux.py", False),
        ("lora_dag/pages/markdown.py", False),
        ("stages/train/__pycache__/new.pyc", False),
        ("stages/train/.new.py.swp", False),
    ):
        path = Path(name)
        original = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((original or b"") + b"#")
        assert (digest(stages["train"]["deps"], "sd") != before) == changes, name
        path.unlink() if original is None else path.write_bytes(original)


def test_a_stage_s_own_digest_is_of_the_code_that_dvc_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of train's ended runs and validate's evidence: an edit of sweeps/, which neither imports, leaves both valid."""
    for path in ("lora_dag", "stages"):
        shutil.copytree(ROOT / path, tmp_path / path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.setattr(code, "ROOT", tmp_path)  # which is not the current folder
    for name in ("train", "validate"):
        before = stage_digest(name, "sd")
        for file, changes in (
            ("lora_dag/sweeps/grid.py", False),
            ("lora_dag/formats/peft.py", False),
            ("lora_dag/families/flux.py", False),
            ("lora_dag/families/sd.py", True),
            (f"stages/{name}/params.py", True),
        ):
            original = (tmp_path / file).read_bytes()
            (tmp_path / file).write_bytes(original + b"#")
            assert (stage_digest(name, "sd") != before) == changes, (name, file)
            (tmp_path / file).write_bytes(original)


def test_the_leaderboard_s_digest_is_of_all_that_its_imports_reach(tmp_path: Path) -> None:
    """Of a package as a whole: a page's template is no import. Other commands and stages draw nothing of it."""
    for path in ("lora_dag", "stages"):
        shutil.copytree(ROOT / path, tmp_path / path)
    before = command_digest("leaderboard", tmp_path)
    for file, changes in (
        ("lora_dag/commands/leaderboard/ranking.py", True),
        ("lora_dag/commands/compare/verdict.py", True),
        ("lora_dag/evaluation/bootstrap.py", True),
        ("lora_dag/pages/templates/page.css", True),
        ("lora_dag/sweeps/grid.py", True),
        ("lora_dag/core/files.py", True),
        ("lora_dag/commands/gate/rule_changes.py", False),
        ("lora_dag/commands/check.py", False),
        ("lora_dag/families/sd.py", False),
        ("stages/train/loop.py", False),
    ):
        original = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(original + b"#")
        assert (command_digest("leaderboard", tmp_path) != before) == changes, file
        (tmp_path / file).write_bytes(original)
