"""Two revisions of a small repository with an experiment, and the errors a person can make."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.artifacts import picture_table
from stages.compare import __main__ as compare
from stages.compare import revisions, sheets, sides
from stages.core import evaluation, thumbnails
from stages.core.console import UserError
from stages.core.files import read_json, sha256_file, write_json, write_text
from stages.core.sheets import cut
from tests.compared import (
    COLOURS,
    PROMPTS,
    SCORES,
    change_lineage,
    commit,
    git,
    write_revision,
    write_scores,
)


@dataclass
class Repository:
    """main: rank 8 (tag start: without reports); experiment clear-newt: rank 16; workspace: as main."""

    run: Callable[..., str]

    def experiment(self, name: str, rank: int, gain: float, seed: int = 0) -> None:
        """An experiment of HEAD."""
        head = git("rev-parse", "HEAD")
        write_revision(rank, gain, seed)
        made = commit(name)
        git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", made)
        git("reset", "-q", "--hard", head)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    monkeypatch.chdir(tmp_path)
    git("init", "-q", "-b", "main")
    write_text(Path("params.yaml"), "lora:\n  rank: 8\n")
    commit("Start")
    git("tag", "start")
    write_revision(rank=8, gain=0.1)
    commit("Report rank 8")

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["compare", *arguments])
        shutil.rmtree(tmp_path / "compare", ignore_errors=True)
        compare.main()
        (page,) = tmp_path.glob("compare/*/compare.md")
        return page.read_text(encoding="utf-8")

    made = Repository(run)
    made.experiment("clear-newt", rank=16, gain=0.15)
    return made


def test_a_better_experiment(repository: Repository) -> None:
    page = repository.run("main", "clear-newt")
    words = "better, −12.6 % [−12.6, −12.6], with one seed each."
    assert f"**clear-newt (lora.rank 16) against main (lora.rank 8): {words}**" in page
    assert "| lora.rank | 8 | 16 |" in page
    assert "lora.alpha" not in page and "report.title" not in page
    assert "| val.loss | 0.3965 | 0.3465 (−0.05 ✓) |" in page
    assert "| train.num_trainable_parameters | 800 | 1600 (+800) |" in page
    assert "val.loss_change_low" not in page and "val.table" not in page


def test_a_verdict_marks_no_metric_that_it_is_not_of(repository: Repository) -> None:
    write_revision(rank=16, gain=0.15)
    page = repository.run()
    assert "better, −12.6 %" in page and "| val.loss | 0.3965 | 0.3465 (−0.05 ✓) |" in page
    assert "| val.train_loss | 0.3965 | 0.3465 (−0.05) |" in page
    assert "| val.loss_low_noise | 0.3965 | 0.3465 (−0.05) |" in page


def test_a_worse_workspace_against_an_experiment(repository: Repository) -> None:
    page = repository.run("clear-newt")
    words = "worse, +14.4 % [+14.4, +14.4], with one seed each."
    assert f"**workspace (lora.rank 8) against clear-newt (lora.rank 16): {words}**" in page
    assert "(+0.05 ✗)" in page


def test_head_and_an_untouched_workspace_are_the_same(repository: Repository) -> None:
    page = repository.run()
    assert "equal: the held-out losses are the same to the last digit." in page
    assert "None." in page and "are equal." in page


def shift(*changes: float) -> None:
    """The workspace at rank 16, each picture's loss changed by the next of ``changes``, over and over."""
    write_revision(rank=16, gain=0.1)
    scores = evaluation.read_scores(SCORES.read_text())
    moved = [replace(s, adapter=s.adapter + changes[int(s.file_name[0]) % len(changes)]) for s in scores]
    write_scores(moved, "0123456789abcdef")


def test_a_difference_that_the_pictures_cannot_show(repository: Repository) -> None:
    shift(0.01, -0.0098)
    page = repository.run()
    assert ": within noise, +0.0 % [−2.4, +2.4].** Held-out loss 0.3965 → 0.3966; 95 % interval over 8 held" in page
    assert "**Seed noise is not in the interval**" in page and "`dvc exp run -S train.seed=1`" in page
    assert "✗" not in page and "✓" not in page


def test_renamed_pictures_are_paired_all_the_same(repository: Repository) -> None:
    write_revision(rank=16, gain=0.1)
    scores = evaluation.read_scores(SCORES.read_text())
    write_scores([replace(s, file_name=f"new-{s.file_name}", adapter=s.adapter + 0.05) for s in scores], "another")
    assert ": worse, +12.6 %" in repository.run()


def test_the_same_setting_and_seed_is_never_better(repository: Repository) -> None:
    write_revision(rank=8, gain=0.2)
    page = repository.run()
    assert ": within noise, −25.2 %.**" in page and "another machine, or files edited by hand" in page


def test_tables_are_joined_where_they_share_pictures(repository: Repository) -> None:
    write_revision(rank=16, gain=0.15, table="another", pictures="2345678")
    page = repository.run()
    assert ": better, −12.6 %" in page and "over 6 held-out pictures that both have (of 8 and 7)" in page
    assert "| val.loss | 0.3965 | 0.345 (−0.0515) |" in page  # of other pictures: no mark


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base": {"unet": "a", "vae": "w", "scheduler": "s"}}, "(the vae)"),
        (
            {"validate": {"prompts": ["red apple"], "scales": [0.5, 1.0], "seed": 1, "num_timesteps": 2}},
            "(validate.seed)",
        ),
        ({}, "(pictures, their sizes or captions)"),
    ],
)
def test_other_tables_are_not_compared(repository: Repository, changes: dict[str, Any], reason: str) -> None:
    write_revision(rank=16, gain=0.2, table="another", pictures="abcdefgh")
    change_lineage(**changes)
    page = repository.run()
    assert f"not comparable: the held-out table differs {reason}.**" in page
    assert "✗" not in page and "✓" not in page and "interval" not in page
    assert re.search(r"\| val\.loss \| 0\.\d+ \| 0\.\d+ \|", page)  # side by side, without a difference


@pytest.mark.parametrize(("caption", "reason"), [("apple", "sizes or crops"), ("pear", "captions")])
def test_tables_that_share_no_row_say_what_differs(repository: Repository, caption: str, reason: str) -> None:
    write_pictures({"a": "apple"}, split="heldout")
    commit("Before")
    write_revision(rank=16, gain=0.2, table="another", pictures="abcdefgh")
    write_pictures({"a": caption}, split="heldout")
    assert f"the held-out table differs ({reason}" in repository.run()


def test_one_shared_picture_has_no_interval(repository: Repository) -> None:
    write_revision(rank=16, gain=0.2, table="another", pictures="0abc")
    assert "not comparable: the held-out tables share 1 picture, and an interval takes 2" in repository.run()


def without_names() -> None:
    """heldout.csv as it was before rows had names."""
    lines = SCORES.read_text().splitlines()
    write_text(SCORES, "\n".join(line.partition(",")[2] for line in lines) + "\n")


def test_rows_without_names_are_joined_by_position(repository: Repository) -> None:
    write_revision(rank=16, gain=0.15)
    without_names()
    assert ": better, −12.6 %" in repository.run()
    write_revision(rank=16, gain=0.15, table="another")
    without_names()
    page = repository.run()
    assert "table differs (pictures, their sizes or captions, workspace from before its rows had names)" in page


def test_three_revisions_in_one_table(repository: Repository) -> None:
    write_revision(rank=16, gain=0.2)
    page = repository.run("main", "clear-newt", "workspace")
    assert page.startswith("# clear-newt and workspace against main\n")
    assert "| lora.rank | 8 | 16 | 16 |" in page
    assert "| val.loss | 0.3965 | 0.3465 (−0.05 ✓) | 0.2965 (−0.1 ✓) |" in page
    with Image.open("compare/main..clear-newt..workspace/samples.png") as picture:
        assert len(cut(picture.convert("RGB"), 2, 4, 64)[0]) == 4


def test_repeats_among_the_experiments_are_found_and_named(repository: Repository) -> None:
    for seed, gain in ((1, 0.102), (2, 0.098)):
        repository.experiment(f"seed-{seed}", rank=8, gain=gain, seed=seed)
    page = repository.run("main", "clear-newt")
    assert "clear-newt (lora.rank 16) against main (lora.rank 8): better, −12.6 % [−15.1, −10.1].**" in page
    assert "mean of clear-newt against mean of main, seed-" in page and "between seeds 0.5 %." in page
    page = repository.run("seed-1", "seed-2")
    assert ": within noise, +1.0 % [" in page and "They differ in train.seed alone: this is what a seed does" in page


def test_cost_is_that_of_the_workspace(repository: Repository) -> None:
    run = {"seconds": 12.5, "images_per_second": 50.4, "environment": {}}
    write_json(Path("reports/train/run.json"), run | {"of": sha256_file(Path("reports/train/metrics.json"))})
    assert "| train: images per second | 50.4 |" in repository.run()
    write_json(Path("reports/train/run.json"), run | {"of": "0" * 64})  # DVC restored another run's figures since
    assert "## Cost" not in repository.run()
    write_json(Path("reports/train/run.json"), run | {"of": sha256_file(Path("reports/train/metrics.json"))})
    assert "## Cost" not in repository.run("main", "clear-newt")


def test_the_html_page_holds_all_it_shows(repository: Repository) -> None:
    write_pictures({"a": "apple"})
    commit("One picture")
    write_pictures({"a": "<script>alert(1)</script>"})
    write_revision(rank=16, gain=0.15)
    repository.run()
    html = Path("compare/HEAD..workspace/compare.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "<script>alert" not in html
    assert html.count('type="range"') == len(PROMPTS)
    assert not re.search(r'(src|href)="(?!data:)', html)


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"base": {"unet": "b", "vae": "v", "scheduler": "s"}}, "| the base's unet | `a` | `b` |"),
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
    assert "**workspace against HEAD: better, −12.6 %" in page
    assert f"** More than parameters differs: {row.split(' | ')[0][2:]}." in page


def test_other_code_of_train_is_told_and_is_no_repeat(repository: Repository) -> None:
    entry = "    - path: stages/train/trainer.py\n      hash: md5\n      md5: {}\n      size: 1\n"
    lock = f"stages:\n  train:\n    deps:\n{entry}"
    write_text(Path("dvc.lock"), lock.format("a"))
    commit("Lock")
    write_revision(rank=16, gain=0.15)
    assert "workspace (lora.rank 16) against" in repository.run()
    write_text(Path("dvc.lock"), lock.format("b") + "  validate: {}\n")
    assert "** More than parameters differs: the code of train. Held-out" in repository.run()
    write_revision(rank=8, gain=0.11, seed=1)
    assert "Seed noise is not in the interval" in repository.run()


def test_inputs_that_the_parameter_moves_are_its_doing(repository: Repository) -> None:
    write_revision(rank=8, gain=0.15)
    with Path("params.yaml").open("a") as file:
        file.write("model:\n  dtype: bfloat16\n")
    change_lineage(latents="f")
    page = repository.run()
    assert (
        "workspace (model.dtype `bfloat16`) against HEAD (model.dtype not set): better" in page
        and "More than" not in page
    )
    assert "| latents and prompt embeddings | `d` | `f` |" in page


PICTURE_TABLE = Path("reports/dataset/pictures.csv")


def write_pictures(captions: dict[str, str], split: str = "train") -> None:
    """pictures.csv of red squares, named by their captions' keys."""
    rows = [
        {"file_name": f"{name}.png", "split": split, "captions": caption, "sha256": f"{ord(name):064x}"}
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
    assert "dataset-workspace.png" not in page and not Path("compare/HEAD..workspace/dataset-workspace.png").exists()
    thumbnails.save(f"{ord('a'):064x}", Image.new("RGB", (64, 64), "#ff0000"))
    page = repository.run()
    assert "![Thumbnails](dataset-workspace.png)\n\n## Samples" in page
    with Image.open("compare/HEAD..workspace/dataset-workspace.png") as drawn:
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
    assert str(error.value).startswith(message) and "run `dvc repro` first" in str(error.value)
    assert not list(Path("compare").glob("*"))


def test_sheet_shows_both_bases_where_they_were_drawn_in_another_size(repository: Repository) -> None:
    change_lineage(sheet={"cell": 64, "picture": [32, 32]})
    repository.run()
    with Image.open("compare/HEAD..workspace/samples.png") as picture:
        rows = cut(picture.convert("RGB"), 2, 4, 64)
    assert "#" + bytes(rows[0][2].getpixel((32, 32))).hex() == COLOURS["base"]


def test_pictures_at_another_strength_are_labelled_with_it(repository: Repository) -> None:
    settings = read_json(Path("reports/validate/lineage.json"))["validate"]
    change_lineage(validate=settings | {"scales": [0.5, 0.8]})  # the sheet's last column, which was 1.0
    repository.run()
    page = Path("compare/HEAD..workspace/compare.html").read_text()
    assert "<figcaption><span>HEAD</span><span>workspace x 0.8</span></figcaption>" in page
    with Image.open("compare/HEAD..workspace/samples.png") as picture:
        cell = cut(picture.convert("RGB"), 2, 3, 64)[0][2]
    assert "#" + bytes(cell.getpixel((32, 32))).hex() == COLOURS[8]


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
    assert "The sheets share no prompt." in repository.run()
    assert not list(Path("compare").glob("*/samples.png"))


def test_a_shallow_clone_is_named(
    repository: Repository, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("shallow")
    git("clone", "-q", "--depth", "1", Path.cwd().as_uri(), str(folder / "clone"))
    monkeypatch.chdir(folder / "clone")
    with pytest.raises(UserError, match=r"^HEAD~1: no commit, .*; this clone is shallow: `git fetch --unshallow`"):
        revisions.find_commit("HEAD~1")


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
    whole = read_json(Path("reports/validate/lineage.json"))
    change_lineage(**{section: whole[section] | {key: value}})
    message = rf"^workspace: reports/validate/lineage.json is damaged \(ValueError: {section}.{key} is [^\n]*$"
    with pytest.raises(UserError, match=message):
        repository.run()


def test_a_sheet_that_is_too_small_or_too_large_is_damaged(repository: Repository) -> None:
    path = Path("reports/samples.png")
    whole = path.read_bytes()
    for width, height in ((1, 1), (100_000, 100_000)):  # the second by its header, as a decompression bomb has it
        Image.new("RGB", (1, 1)).save(path)
        head = b"IHDR" + struct.pack(">II", width, height) + path.read_bytes()[24:29]
        path.write_bytes(whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + path.read_bytes()[33:])
        with pytest.raises(UserError, match="^workspace: reports/samples.png is damaged; run `dvc repro` first$"):
            repository.run()


def test_names_in_reports_are_no_markup(repository: Repository) -> None:
    path = Path("reports/metrics.json")
    write_json(path, read_json(path) | {"val.x\n\n# Better\n\n![](/etc/passwd)": 1, "val.loss": "![](x.png)"})
    page = repository.run()
    assert "| `val.x # Better ![](/etc/passwd)` |  | 1 |" in page and "\n# Better" not in page
    assert "| val.loss | 0.3965 | `![](x.png)` |" in page


def test_names_alike_have_thumbnails_of_their_own(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    for branch in ("try/a", "try-a"):
        git("branch", branch)
    monkeypatch.setattr(sheets, "draw_thumbnails", lambda a, b, path: path)
    found = sheets.draw_pictures([sides.read_side(name) for name in ("main", "try/a", "try-a")], Path())
    assert found["dataset try/a"] != found["dataset try-a"]


def test_names_alike_have_folders_of_their_own() -> None:
    found = [compare.folder_name(["main", name]) for name in ("try-a", "try/a", "try~a")]
    assert found[0] == "main..try-a" and len(set(found)) == 3
    assert all(re.fullmatch(r"main\.\.try-a-[0-9a-f]{6}", name) for name in found[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clear-nwt"], "clear-nwt: no commit, branch, tag or DVC experiment of that name (near: clear-newt)"),
        (["mian"], "mian: no commit, branch, tag or DVC experiment of that name (near: main"),
        (
            ["start"],
            "start: has no reports/metrics.json, reports/validate/heldout.csv, ",
        ),
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
    assert revisions.find_commit("clear-newt") != experiment  # HEAD's own
    git("checkout", "-q", "--detach", revisions.find_commit("clear-newt"))
    with pytest.raises(UserError, match="experiments of 2 commits have this name"):
        revisions.find_commit("clear-newt")


def test_starts_without_torch() -> None:
    modules = "stages.compare, stages.validate.__main__, stages.report.__main__"
    code = f"import sys, {modules}; print({{'torch', 'diffusers', 'matplotlib'}} & {{*sys.modules}})"
    command, root = [sys.executable, "-c", code], Path(__file__).parents[1]
    assert subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout.strip() == "set()"


def test_parameters_of_any_depth_are_compared() -> None:
    tree: dict[str, Any] = {"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}
    assert sides.flatten(tree) == {"a.b.c": 1, "a.d": [1, 2], "e": None}
