"""Two revisions of a small repository with an experiment, and the errors a person can make."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages import compare
from stages.artifacts import metrics, picture_table
from stages.core import evaluation, thumbnails
from stages.core.console import UserError
from stages.core.evaluation import Score
from stages.core.files import read_json, write_json, write_text
from stages.core.sheets import cut, save_png, sheet

PROMPTS = ["red apple", "blue boat"]
COLOURS = {"base": "#cc2222", 8: "#22cc22", 16: "#2222cc"}


def write_revision(rank: int, gain: float, table: str = "0123456789abcdef", prompts: list[str] = PROMPTS) -> None:
    """params.yaml and reports/ of an adapter of ``rank`` that is better than the base by ``gain``, in this folder."""
    text = f"lora:\n  rank: {rank}\n  alpha: 8\nreport:\n  title: Rank {rank}\n"
    write_text(Path("params.yaml"), text)
    scores = [
        Score(f"{split}-{index}-{t}", f"{index}.png", split, t, 0.5, 0.5 - gain - 0.001 * index)
        for split in ("heldout", "train")
        for index in range(8)
        for t in (100, 900)
    ]
    write_text(Path("reports/validate/heldout.csv"), evaluation.write_scores(scores))
    measured = evaluation.metrics(scores, 1000, seed=0)
    metrics.save(Path("reports/metrics.json"), measured | {"val.table": table, "val.best_step": 4})
    metrics.save(Path("reports/train/metrics.json"), {"train.num_trainable_parameters": 100 * rank})
    settings = {"prompts": prompts, "scales": [0.5, 1.0], "seed": 0}
    lineage = {
        "base": {"unet": "a"},
        "dataset": {"content": "c"},
        "latents": "d",
        "model": {"dtype": "float32"},
        "sheet": {"cell": 64, "picture": [64, 64]},
        "validate": settings,
    }
    write_json(Path("reports/validate/lineage.json"), lineage)
    columns = (COLOURS["base"], "#888888", COLOURS[rank])
    rows = [[Image.new("RGB", (64, 64), colour) for colour in columns] for _ in prompts]
    save_png(Path("reports/samples.png"), sheet(rows, prompts, ["base", "adapter x 0.5", "adapter"], 64))


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit(message: str) -> str:
    git("add", "-A")
    git("commit", "-q", "-m", message)
    return git("rev-parse", "HEAD")


@dataclass
class Repository:
    """main: rank 8 (tag start: without reports); experiment clear-newt: rank 16; workspace: as main."""

    run: Callable[..., str]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    monkeypatch.chdir(tmp_path)
    git("init", "-q", "-b", "main")
    write_text(Path("params.yaml"), "lora:\n  rank: 8\n")
    commit("Start")
    git("tag", "start")
    write_revision(rank=8, gain=0.1)
    head = commit("Report rank 8")
    write_revision(rank=16, gain=0.15)
    experiment = commit("Experiment")
    git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/clear-newt", experiment)
    git("reset", "-q", "--hard", head)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["compare", *arguments])
        compare.main()
        (page,) = tmp_path.glob("compare/*/compare.md")
        return page.read_text(encoding="utf-8")

    return Repository(run)


def test_a_better_experiment(repository: Repository) -> None:
    page = repository.run("main", "clear-newt")
    assert "**lora.rank 16 (clear-newt) is better than lora.rank 8 (main): held-out loss lower by 0.0500" in page
    assert "| lora.rank | 8 | 16 |" in page
    assert "lora.alpha" not in page and "report.title" not in page
    assert "| val.loss | 0.3965 | 0.3465 | −0.05 ✓ |" in page
    assert "| train.num_trainable_parameters | 800 | 1600 | +800 |" in page
    assert "val.loss_change_low" not in page and "val.table" not in page


def test_a_worse_workspace_against_an_experiment(repository: Repository) -> None:
    page = repository.run("clear-newt")
    assert "lora.rank 16 (clear-newt) is better than lora.rank 8 (workspace)" in page
    assert "+0.05 ✗" in page


def test_head_and_an_untouched_workspace_are_the_same(repository: Repository) -> None:
    page = repository.run()
    assert "The held-out losses are the same to the last digit." in page
    assert "None." in page and "are equal." in page


def test_a_difference_that_the_pictures_cannot_show(repository: Repository) -> None:
    scores = evaluation.read_scores(Path("reports/validate/heldout.csv").read_text())
    shifted = [
        Score(
            s.row, s.file_name, s.split, s.timestep, s.base, s.adapter + (0.01 if int(s.file_name[0]) % 2 else -0.0098)
        )
        for s in scores
    ]
    write_text(Path("reports/validate/heldout.csv"), evaluation.write_scores(shifted))
    page = repository.run()
    assert "No difference that the held-out pictures can show: +0.0001" in page
    assert "✗" not in page and "✓" not in page


def test_other_tables_are_not_paired(repository: Repository) -> None:
    write_revision(rank=16, gain=0.2, table="another")
    page = repository.run()
    assert "No verdict: the tables of held-out rows differ" in page
    assert "✗" not in page and "✓" not in page
    assert "interval" not in page


def test_renamed_pictures_are_paired_all_the_same(repository: Repository) -> None:
    scores = evaluation.read_scores(Path("reports/validate/heldout.csv").read_text())
    renamed = [dataclasses.replace(s, file_name=f"new-{s.file_name}", adapter=s.adapter + 0.05) for s in scores]
    write_text(Path("reports/validate/heldout.csv"), evaluation.write_scores(renamed))
    assert "HEAD is better than workspace: held-out loss lower by 0.0500" in repository.run()


def change_lineage(**changes: Any) -> None:
    path = Path("reports/validate/lineage.json")
    write_json(path, read_json(path) | changes)


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"base": {"unet": "b"}}, "| the base's unet | `a` | `b` |"),
        ({"dataset": {"content": "e"}}, "| pictures and captions | `c` | `e` |"),
        ({"latents": "f"}, "| latents and prompt embeddings | `d` | `f` |"),
    ],
)
def test_one_parameter_is_not_credited_with_other_inputs(
    repository: Repository, changes: dict[str, Any], row: str
) -> None:
    write_revision(rank=16, gain=0.15)
    change_lineage(**changes)
    page = repository.run()
    assert row in page and "| lora.rank | 8 | 16 |" in page
    assert "**workspace is better than HEAD: held-out loss lower by 0.0500" in page
    assert f"More than parameters differs: {row.split(' | ')[0][2:]}.**" in page


def test_inputs_that_the_parameter_moves_are_its_doing(repository: Repository) -> None:
    write_revision(rank=8, gain=0.15)
    with Path("params.yaml").open("a") as file:
        file.write("model:\n  dtype: bfloat16\n")
    change_lineage(latents="f")
    page = repository.run()
    assert "model.dtype bfloat16 (workspace) is better than" in page and "More than" not in page
    assert "| latents and prompt embeddings | `d` | `f` |" in page


PICTURE_TABLE = Path("reports/dataset/pictures.csv")


def write_pictures(captions: dict[str, str]) -> None:
    """pictures.csv of red squares, named by their captions' keys."""
    rows = [
        {"file_name": f"{name}.png", "split": "train", "captions": caption, "sha256": f"{ord(name):064x}"}
        for name, caption in captions.items()
    ]
    picture_table.save(PICTURE_TABLE, rows)


def test_dataset_changes_are_listed_with_the_thumbnails_that_are_kept(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_STATE_DIR", str(tmp_path / ".state"))
    write_pictures({"a": "apple", "b": "boat"})
    commit("Two pictures")
    write_pictures({"b": "blue boat", "c": "cat"})
    page = repository.run()
    assert "## Dataset\n\nFrom HEAD to workspace: 1 added, 1 removed, 1 recaptioned.\n\n**1 added**" in page
    assert "- `b.png`: `boat` → `blue boat`" in page
    assert "dataset.png" not in page and not Path("compare/HEAD..workspace/dataset.png").exists()
    thumbnails.save(f"{ord('a'):064x}", Image.new("RGB", (64, 64), "#ff0000"))
    page = repository.run()
    assert "![Thumbnails](dataset.png)\n\n## Samples" in page
    with Image.open("compare/HEAD..workspace/dataset.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    assert ((pixels[..., 0] > 240) & (pixels[..., 1:].max(-1) < 20)).sum() > 70 * 70


def test_equal_datasets_have_no_section(repository: Repository) -> None:
    write_pictures({"a": "apple"})
    commit("One picture")
    assert "Dataset" not in repository.run()


@pytest.mark.parametrize("arguments", [[], ["workspace", "HEAD"]])
def test_a_revision_from_before_the_table_is_no_change(repository: Repository, arguments: list[str]) -> None:
    write_pictures({"a": "apple"})
    assert "Dataset" not in repository.run(*arguments)


def test_a_damaged_table_is_one_line(repository: Repository) -> None:
    write_text(PICTURE_TABLE, "nonsense\n")
    with pytest.raises(UserError, match="^workspace: reports/dataset/pictures.csv is damaged .*; run `dvc repro`"):
        repository.run()


def test_sheet_shows_both_bases_where_they_were_drawn_in_another_size(repository: Repository) -> None:
    change_lineage(sheet={"cell": 64, "picture": [32, 32]})
    repository.run()
    with Image.open("compare/HEAD..workspace/samples.png") as picture:
        rows = cut(picture.convert("RGB"), 2, 4, 64)
    assert "#" + bytes(rows[0][2].getpixel((32, 32))).hex() == COLOURS["base"]


def test_sheet_shows_the_base_once_and_each_adapter(repository: Repository) -> None:
    repository.run("main", "clear-newt")
    with Image.open("compare/main..clear-newt/samples.png") as picture:
        rows = cut(picture.convert("RGB"), 2, 3, 64)
    seen = [["#" + bytes(cell.getpixel((32, 32))).hex() for cell in row] for row in rows]
    assert seen == [[COLOURS["base"], COLOURS[8], COLOURS[16]]] * 2


def test_sheet_takes_the_prompts_that_both_have(repository: Repository) -> None:
    write_revision(rank=16, gain=0.2, prompts=["green tree", "blue boat"])
    repository.run()
    with Image.open("compare/HEAD..workspace/samples.png") as picture:
        assert picture.height < 150


def test_sheets_without_a_common_prompt(repository: Repository) -> None:
    write_revision(rank=16, gain=0.2, prompts=["green tree"])
    assert "no prompt in common" in repository.run()
    assert not list(Path("compare").glob("*/samples.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clear-nwt"], "clear-nwt: no commit, branch, tag or DVC experiment of that name (near: clear-newt)"),
        (["mian"], "mian: no commit, branch, tag or DVC experiment of that name (near: main"),
        (["start"], "start: has no reports/metrics.json; run `dvc repro` there and commit reports/"),
    ],
)
def test_errors_name_what_is_near(repository: Repository, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        repository.run(*arguments)
    assert str(error.value).startswith(message)
    assert not Path("compare").exists()


def test_workspace_without_reports(repository: Repository) -> None:
    Path("reports/metrics.json").unlink()
    with pytest.raises(UserError, match="^workspace: has no reports/metrics.json; run `dvc repro` first$"):
        repository.run()


def test_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(sys, "argv", ["compare"])
    with pytest.raises(UserError, match="in no git repository"):
        compare.main()


def test_one_name_for_experiments_of_two_commits(repository: Repository) -> None:
    other, experiment = git("rev-parse", "start"), git("rev-parse", "main")
    git("update-ref", f"refs/exps/{other[:2]}/{other[2:]}/clear-newt", experiment)
    assert compare.resolve("clear-newt") != experiment  # HEAD's own
    git("checkout", "-q", "--detach", compare.resolve("clear-newt"))
    with pytest.raises(UserError, match="experiments of 2 commits have this name"):
        compare.resolve("clear-newt")


def test_starts_without_torch() -> None:
    modules = "stages.compare, stages.validate.__main__, stages.report.__main__"
    code = f"import sys, {modules}; print({{'torch', 'diffusers', 'matplotlib'}} & {{*sys.modules}})"
    command, root = [sys.executable, "-c", code], Path(__file__).parents[1]
    assert subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout.strip() == "set()"


def test_parameters_of_any_depth_are_compared() -> None:
    tree: dict[str, Any] = {"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}
    assert compare.flatten(tree) == {"a.b.c": 1, "a.d": [1, 2], "e": None}
