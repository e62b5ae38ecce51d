"""DVC's own tables show a dozen numbers of a run, and nothing of the files with details."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

from lora_dag.artifacts import lineage
from tests.helpers.planted import Clone
from tests.helpers.reports import DATASET, MEASURED, TRAIN, write_reports
from tests.helpers.workspace import Workspace


def dvc(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "dvc", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_headline_metrics_equal_the_measurements_of_the_stages(workspace: Workspace) -> None:
    write_reports(Path("reports"))
    workspace.run("report")
    found = json.loads(Path("reports/headline.json").read_text())
    measured = DATASET | TRAIN | MEASURED
    names = ["val.loss", "val.loss_change", "val.loss_change_low", "val.loss_change_high", "val.overfit_gap"]
    names += ["val.best_step", "train.loss_final", "train.num_trainable_parameters", "num_heldout"]
    assert found == {name: measured[name] for name in names} | {"export.megabytes": 0.43}


def test_dvc_exp_show_has_only_the_headline_columns(clone: Clone) -> None:
    clone("rank-4")
    names = list(json.loads(Path("reports/headline.json").read_text()))
    columns = next(csv.reader(io.StringIO(dvc("exp", "show", "--csv").stdout)))
    assert columns[:5] == ["Experiment", "rev", "typ", "Created", "parent"]
    assert columns[5 : 5 + len(names)] == names
    assert not [name for name in columns if "lineage.json:" in name or "metrics.json:" in name]


def test_dvc_metrics_diff_shows_the_headline_and_other_files_on_request(clone: Clone) -> None:
    clone("rank-4")
    few = json.loads(dvc("metrics", "diff", "--json", "origin/main").stdout)
    found = {path: set(changes) for path, changes in few.items()}
    assert found == {"reports/headline.json": {"val.loss", "val.loss_change"}}
    more = json.loads(dvc("metrics", "diff", "--json", "--targets", "reports/metrics.json", "--", "origin/main").stdout)
    assert {"val.train_loss", "val.loss_low_noise"} <= set(more["reports/metrics.json"])


def test_dvc_plots_accepts_the_files_of_detailed_metrics(clone: Clone, tmp_path: Path) -> None:
    """DVC warns of every empty list that it finds in an object."""
    clone("rank-4")
    details = ["reports/metrics.json", "reports/validate/lineage.json", "reports/train/metrics.json"]
    shown = dvc("plots", "diff", "origin/main", "--json", "--targets", *details)
    assert json.loads(shown.stdout) == {"data": {path: [] for path in details}} and shown.stderr == ""


def test_lineage_is_read_as_it_was_written_and_as_it_was_before(tmp_path: Path) -> None:
    made = {"train": {"seed": 0, "optimizer_args": {}}, "biases": [], "adapter": "a"}
    lineage.save(tmp_path / "lineage.json", made)
    text = (tmp_path / "lineage.json").read_text()
    assert lineage.load(tmp_path / "lineage.json") == lineage.parse(text) == lineage.parse(json.dumps(made)) == made
    assert json.loads(text) == [["adapter", "a"], ["biases", []], ["train", made["train"]]]
