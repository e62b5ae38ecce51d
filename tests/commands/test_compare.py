"""Two revisions of a small repository with an experiment: what their page says of metrics, tables, inputs and data."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_dag.commands.compare.page import ONE_COMMIT
from lora_dag.core.files import read_json, sha256_file, write_json, write_text
from lora_dag.evaluation import heldout_table
from lora_dag.pages.sheets import cut
from tests.helpers.compared import (
    PROMPTS,
    SCORES,
    Repository,
    change_lineage,
    commit,
    scores_to_csv,
    write_images,
    write_revision,
)


def test_a_better_experiment(repository: Repository) -> None:
    page = repository.run("main", "clear-newt")
    words = "better, −12.6 % [−12.6, −12.6], with one seed each."
    assert f"**clear-newt (lora.rank 16) against main (lora.rank 8): {words}**" in page
    assert "| lora.rank | 8 | 16 |" in page
    assert "lora.alpha" not in page and "report.title" not in page
    assert "| val.loss ↓ | 0.3965 | 0.3465 (−0.05 ✓) |" in page
    assert "| train.num_trainable_parameters | 800 | 1600 (+800) |" in page
    assert "val.loss_change_low" not in page and "val.table" not in page


def test_only_the_metric_of_the_verdict_is_marked(repository: Repository) -> None:
    write_revision(rank=16, gain=0.15)
    page = repository.run()
    assert "better, −12.6 %" in page and "| val.loss ↓ | 0.3965 | 0.3465 (−0.05 ✓) |" in page
    assert "| val.train_loss ↓ | 0.3965 | 0.3465 (−0.05) |" in page
    assert "| val.loss_low_noise ↓ | 0.3965 | 0.3465 (−0.05) |" in page


def test_metrics_are_ordered_and_have_a_direction(repository: Repository) -> None:
    """A metric without a row in METRICS comes last, by its own name."""
    write_revision(rank=16, gain=0.15)
    path = Path("reports/metrics.json")
    more = {"a.unknown": 2, "samples.clip_score": 25.0, "samples.clip_score_base": 20.0, "samples.copied_share": 0.5}
    write_json(path, read_json(path) | more)
    page = repository.run()
    names = [line[2:].partition(" |")[0] for line in page.splitlines() if re.match(r"\| (val|samples|train|a)\.", line)]
    assert names[0] == "val.loss ↓" and names[-1] == "a.unknown"
    assert names[-4:-1] == ["samples.copied_share ↓", "samples.clip_score ↑", "train.num_trainable_parameters"]
    assert "| samples.clip_score ↑ |  | 25 |" in page
    assert "↓ lower is better, ↑ higher is better. ✓ better, ✗ worse than HEAD." in page


def test_a_worse_workspace_against_an_experiment(repository: Repository) -> None:
    page = repository.run("clear-newt")
    words = "worse, +14.4 % [+14.4, +14.4], with one seed each."
    assert f"**workspace (lora.rank 8) against clear-newt (lora.rank 16): {words}**" in page
    assert "(+0.05 ✗)" in page


def test_head_and_an_untouched_workspace_are_the_same(repository: Repository) -> None:
    page = repository.run()
    assert "equal: all held-out losses are identical." in page
    assert "No parameter and no input differs." in page and "equal." in page and ONE_COMMIT not in page
    assert ONE_COMMIT in repository.run("HEAD", "HEAD")  # such as a branch whose commit was forgotten


def shift(*changes: float) -> None:
    """The workspace at rank 16, each image's loss changed by the next of ``changes``, over and over."""
    write_revision(rank=16, gain=0.1)
    scores = heldout_table.scores_from_csv(SCORES.read_text())
    moved = [replace(s, adapter=s.adapter + changes[int(s.file_name[0]) % len(changes)]) for s in scores]
    scores_to_csv(moved, "0123456789abcdef")


def test_a_difference_that_the_images_cannot_show(repository: Repository) -> None:
    shift(0.01, -0.0098)
    page = repository.run()
    assert ": within noise, 0.0 % [−2.4, +2.4].**\n\n- 8 held-out images are too few for a verdict." in page
    assert "0.3965 → 0.3966. The 95 % interval is over 8 held-out images (percentile bootstrap, stretched" in page
    assert "**Seed noise is not in the interval**" in page and "`dvc exp run -S train.seed=1`" in page
    assert "✗" not in page and "✓" not in page


def test_renamed_images_are_paired_all_the_same(repository: Repository) -> None:
    write_revision(rank=16, gain=0.1)
    scores = heldout_table.scores_from_csv(SCORES.read_text())
    scores_to_csv([replace(s, file_name=f"new-{s.file_name}", adapter=s.adapter + 0.05) for s in scores], "another")
    assert ": worse, +12.6 %" in repository.run()


def test_the_same_setting_and_seed_is_never_better(repository: Repository) -> None:
    write_revision(rank=8, gain=0.2)
    page = repository.run()
    assert ": within noise, −25.2 %.**" in page and "Both runs have the same settings and seed" in page


def test_tables_are_joined_where_they_share_images(repository: Repository) -> None:
    write_revision(rank=16, gain=0.15, table="another", images="2345678")
    page = repository.run()
    assert ": better, −12.6 %" in page and "over 6 shared held-out images, of 8 and 7" in page
    assert "| val.loss ↓ | 0.3965 | 0.345 (−0.0515) |" in page  # of other images: no mark


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base": {"unet": "a", "vae": "w", "scheduler": "s"}}, "(the vae)"),
        (
            {"validate": {"prompts": ["red apple"], "scales": [0.5, 1.0], "seed": 1, "num_timesteps": 2}},
            "(validate.seed)",
        ),
        ({}, "(images, their sizes or captions)"),
    ],
)
def test_other_tables_are_not_compared(repository: Repository, changes: dict[str, Any], reason: str) -> None:
    write_revision(rank=16, gain=0.2, table="another", images="abcdefgh")
    change_lineage(**changes)
    page = repository.run()
    assert f"not comparable: the held-out tables differ {reason}.**" in page
    assert "✗" not in page and "✓" not in page and "interval" not in page
    assert re.search(r"\| val\.loss ↓ \| 0\.\d+ \| 0\.\d+ \|", page)  # side by side, without a difference


@pytest.mark.parametrize(("caption", "reason"), [("apple", "sizes or crops"), ("pear", "captions")])
def test_tables_that_share_no_row_say_what_differs(repository: Repository, caption: str, reason: str) -> None:
    write_images({"a": "apple"}, split="heldout")
    commit("Before")
    write_revision(rank=16, gain=0.2, table="another", images="abcdefgh")
    write_images({"a": caption}, split="heldout")
    assert f"the held-out tables differ ({reason}" in repository.run()


def test_one_shared_image_has_no_interval(repository: Repository) -> None:
    write_revision(rank=16, gain=0.2, table="another", images="0abc")
    assert "not comparable: the held-out tables share 1 image, but an interval needs 2" in repository.run()


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
    assert "tables differ (images, their sizes or captions, rows of workspace have no names)" in page


def test_three_revisions_in_one_table(repository: Repository) -> None:
    write_revision(rank=16, gain=0.2)
    page = repository.run("main", "clear-newt", "workspace")
    assert page.startswith("# clear-newt and workspace against main\n")
    assert "| lora.rank | 8 | 16 | 16 |" in page
    assert "| val.loss ↓ | 0.3965 | 0.3465 (−0.05 ✓) | 0.2965 (−0.1 ✓) |" in page
    with Image.open("compare/main..clear-newt..workspace/samples.png") as image:
        assert len(cut(image.convert("RGB"), 2, 4, 64)[0]) == 4


def test_repeats_among_the_experiments_are_found_and_named(repository: Repository) -> None:
    for seed, gain in ((1, 0.102), (2, 0.098)):
        repository.experiment(f"seed-{seed}", rank=8, gain=gain, seed=seed)
    page = repository.run("main", "clear-newt")
    assert "clear-newt (lora.rank 16) against main (lora.rank 8): better, −12.6 % [−15.1, −10.1].**" in page
    assert "Mean of clear-newt against mean of main, seed-" in page and "between seeds is 0.5 %." in page
    page = repository.run("seed-1", "seed-2")
    assert ": within noise, +1.0 % [" in page and "Only train.seed differs: this is the effect of a seed" in page


def test_cost_is_that_of_the_workspace(repository: Repository) -> None:
    run = {"seconds": 12.5, "images_per_second": 50.4, "environment": {}}
    write_json(Path("reports/train/run.json"), run | {"of": sha256_file(Path("reports/train/metrics.json"))})
    assert "| train: images per second | 50.4 |" in repository.run()
    write_json(Path("reports/train/run.json"), run | {"of": "0" * 64})  # DVC restored another run's figures since
    assert "## Cost" not in repository.run()
    write_json(Path("reports/train/run.json"), run | {"of": sha256_file(Path("reports/train/metrics.json"))})
    assert "## Cost" not in repository.run("main", "clear-newt")


def test_the_html_page_holds_all_it_shows(repository: Repository) -> None:
    write_images({"a": "apple"})
    commit("One image")
    write_images({"a": "<script>alert(1)</script>"})
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
        ({"dataset": {"content": "e"}}, "| images and captions | `c` | `e` |"),
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
    assert f"- **Not only parameters differ**: {row.split(' | ')[0][2:]}." in page


def test_other_results_of_train_are_named_and_no_repeat(repository: Repository) -> None:
    train = "  train:\n    cmd: python -m stages.train\n"
    lock = f"stages:\n{train}    params:\n      stages/train/__init__.py:\n        RESULTS: {{}}\n"
    write_text(Path("dvc.lock"), lock.format(1))
    commit("Lock")
    write_revision(rank=16, gain=0.15)
    assert "workspace (lora.rank 16) against" in repository.run()
    write_text(Path("dvc.lock"), lock.format(2) + "  validate: {}\n")
    assert "- **Not only parameters differ**: RESULTS of train." in repository.run()
    write_revision(rank=8, gain=0.11, seed=1)
    assert "Seed noise is not in the interval" in repository.run()


def write_lock(code: str, adapter: str) -> None:
    """dvc.lock of a run of train, in digits; RESULTS are the same for all."""
    write_text(
        Path("dvc.lock"),
        f"""stages:
  train:
    cmd: python -m stages.train
    deps:
    - path: lora_dag/adapters
      hash: md5
      md5: {code}.dir
      size: 1
      nfiles: 1
    params:
      stages/train/__init__.py:
        RESULTS: 1
    outs:
    - path: data/adapter
      hash: md5
      md5: {adapter}.dir
  validate: {{}}
""",
    )


def test_other_code_of_train_is_named_and_is_no_repeat(repository: Repository) -> None:
    write_lock(code="a", adapter="0")
    commit("Lock")
    write_revision(rank=16, gain=0.15)
    write_lock(code="a", adapter="1")
    assert "workspace (lora.rank 16) against" in repository.run()
    write_lock(code="b", adapter="1")
    page = repository.run()
    assert "**workspace against HEAD: better" in page
    assert "- **Not only parameters differ**: other code of train (with the same RESULTS)." in page
    write_revision(rank=8, gain=0.11, seed=1)
    page = repository.run()
    assert "Seed noise is not in the interval" in page and "effect of a seed" not in page


def test_edited_code_of_train_under_the_same_parameters_has_a_verdict(repository: Repository) -> None:
    write_lock(code="a", adapter="0")
    commit("Lock")
    write_revision(rank=8, gain=0.2)
    write_lock(code="b", adapter="1")
    page = repository.run()
    assert "**workspace against HEAD: better, −25.2 % [−25.2, −25.2], with one seed each.**" in page
    assert "other code of train (with the same RESULTS)" in page and "another machine" not in page


def test_other_code_that_gave_the_same_adapter_is_the_same_setting(repository: Repository) -> None:
    """As `lora-dag relock` leaves a committed experiment."""
    write_lock(code="a", adapter="0")
    commit("Lock")
    write_lock(code="b", adapter="0")
    page = repository.run()
    assert "equal: all held-out losses are identical." in page and "code of train" not in page
    write_revision(rank=8, gain=0.2)
    page = repository.run()
    assert ": within noise, −25.2 %.**" in page and "code of train" not in page
    write_revision(rank=16, gain=0.15)
    write_lock(code="b", adapter="1")
    assert "code of train (with the same RESULTS)" in repository.run()


def test_inputs_that_depend_on_a_changed_parameter_are_no_extra_difference(repository: Repository) -> None:
    write_revision(rank=8, gain=0.15)
    with Path("params.yaml").open("a") as file:
        file.write("model:\n  dtype: bfloat16\n")
    change_lineage(latents="f")
    page = repository.run()
    assert (
        "workspace (model.dtype `bfloat16`) against HEAD (model.dtype not set): better" in page
        and "Not only" not in page
    )
    assert "| latents and prompt embeddings | `d` | `f` |" in page


def test_equal_datasets_have_no_section(repository: Repository) -> None:
    write_images({"a": "apple"})
    commit("One image")
    assert "Dataset" not in repository.run()


@pytest.mark.parametrize("arguments", [[], ["workspace", "HEAD"]])
def test_a_revision_from_before_the_table_is_no_change(repository: Repository, arguments: list[str]) -> None:
    write_images({"a": "apple"})
    assert "Dataset" not in repository.run(*arguments)


def test_names_in_reports_are_no_markup(repository: Repository) -> None:
    path = Path("reports/metrics.json")
    write_json(path, read_json(path) | {"val.x\n\n# Better\n\n![](/etc/passwd)": 1, "val.loss": "![](x.png)"})
    page = repository.run()
    assert "| `val.x # Better ![](/etc/passwd)` |  | 1 |" in page and "\n# Better" not in page
    assert "| val.loss ↓ | 0.3965 | `![](x.png)` |" in page


def test_starts_without_torch() -> None:
    modules = "lora_dag.commands.compare.command, stages.validate.__main__, stages.report.__main__"
    code = f"import sys, {modules}; print({{'torch', 'diffusers', 'matplotlib'}} & {{*sys.modules}})"
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    assert subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout.strip() == "set()"
