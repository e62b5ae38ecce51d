"""Planted runs of a sweep: their order, intervals, fronts, and that what failed is named with its reason."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_dag.artifacts.lineage import save as save_lineage
from lora_dag.commands.compare.verdict import judge
from lora_dag.commands.leaderboard import images
from lora_dag.commands.leaderboard.board import make_board
from lora_dag.commands.leaderboard.command import write_board
from lora_dag.commands.leaderboard.images import fit_labels
from lora_dag.commands.leaderboard.ranking import Table, front, rank
from lora_dag.commands.leaderboard.results import read_results
from lora_dag.core.files import write_json, write_text
from lora_dag.core.params import read_yaml
from lora_dag.evaluation.heldout_table import Score, scores_to_csv
from lora_dag.pages.sheets import save_png, sheet
from lora_dag.sweeps import grid as sweep
from lora_dag.sweeps.grid import Run
from tests.helpers import command
from tests.helpers.errors import refused
from tests.helpers.workspace import REPOSITORY

EMPTY: dict[str, Any] = {"datasets": [], "grid": {}, "rows": [], "seeds": [], "exclude": []}
IMAGES = [f"{index}.png" for index in range(12)]
BASE = 0.8
GAIN = {4: 0.20, 8: 0.30, 16: 0.31, 32: 0.25}  # by rank
MEGABYTES = {4: 1.0, 8: 2.0, 16: 4.0, 32: 8.0}


def write_run(run: Run, names: Sequence[str] = IMAGES, dataset: str = "c", shift: float = 0.0) -> None:
    """All that a finished run leaves, as far as the leaderboard reads it: in the current folder."""
    at = {name: Path(folder) for name, folder in run.folders.items()}
    size, seed = run.value("lora.rank"), run.value("train.seed")
    rng = np.random.default_rng([size, seed])
    losses = BASE - GAIN[size] + shift + rng.normal(0, 0.004) + rng.normal(0, 0.01, len(names))
    scores = [
        Score(f"{dataset}-{split}-{name}-{t}", name, split, t, BASE, loss)
        for split in ("heldout", "train")
        for name, loss in zip(names, losses, strict=True)
        for t in (100, 900)
    ]
    adapter = hashlib.sha256(run.stage_folders["train"].encode()).hexdigest()
    for folder, name in (("prepared", "dataset.json"), ("latents", "manifest.json"), ("adapter", "adapter.json")):
        write_json(at[folder] / name, {})
    settings = run.value("validate")
    save_lineage(
        at["reports"] / "validate/lineage.json",
        {
            "adapter": adapter[:12],
            "base": {"vae": "v", "scheduler": "s"},
            "dataset": {"content": dataset},
            "latents": "l",
            "model": {"dtype": "bfloat16"},
            "sheet": {"cell": 64, "image": [64, 64]},
            "validate": {key: settings[key] for key in ("scales", "prompts", "seed", "num_timesteps")},
        },
    )
    write_text(at["reports"] / "validate/heldout.csv", scores_to_csv(scores))
    write_json(at["reports"] / "metrics.json", {"val.overfit_gap": 0.001, "samples.copied_share": 0.25})
    write_text(at["reports"] / "report.md", "")
    write_json(
        at["train_reports"] / "metrics.json", {"train.num_trainable_parameters": 100 * size, "train.images_seen": 60}
    )
    write_json(at["train_reports"] / "run.json", {"images_per_second": 60 / size})
    write_json(at["export_reports"] / "metrics.json", {"export.megabytes": MEGABYTES[size]})
    exported = {
        "adapter": adapter,
        "lora": {"rank": size},
        "train": {"seed": seed, "num_steps": run.value("train.num_steps")},
    }
    save_lineage(at["export_reports"] / "lineage.json", exported)
    rows = [[Image.new("RGB", (64, 64), color) for color in ("#cc2222", "#22cc22")] for _ in settings["prompts"]]
    save_png(at["reports"] / "samples.png", sheet(rows, settings["prompts"], ["base", "adapter"], 64))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planted(**changes: Any) -> list[Run]:
    """Finished runs; the prompts and scales of their sheets are those that params.yaml is taken to ask for."""
    tree = read_yaml(REPOSITORY / "params.yaml") | {"sweep": EMPTY | changes}
    tree["validate"] = tree["validate"] | {"scales": [1.0], "prompts": ["red apple", "boat"]}
    return sweep.plan(tree)


def board(runs: Sequence[Run]) -> tuple[str, list[dict[str, str]]]:
    write_board(list(runs), Path("reports/sweep"))
    folder = Path("reports/sweep")
    with (folder / "leaderboard.csv").open() as file:
        return (folder / "leaderboard.md").read_text(), list(csv.DictReader(file))


def ranked(runs: Sequence[Run]) -> list[Table]:
    return rank(read_results(runs))[0]


def test_settings_stand_in_order_with_the_intervals_of_compare() -> None:
    runs = planted(grid={"lora.rank": [4, 8, 16]}, seeds=[0, 1])
    for run in runs:
        write_run(run)
    (table,) = ranked(runs)
    sides = {result.run.name: result.done for result in read_results(runs)}
    means = {
        rank: np.mean([s.adapter for name, side in sides.items() if f"-{rank}-" in name for s in side.scores[:24]])
        for rank in (4, 8, 16)
    }
    order = [f"raw/rank-{rank}" for rank in sorted(means, key=lambda rank: means[rank])]
    assert [standing.name for standing in table.ranking] == order
    assert table.df == 3 and table.num_images == 12
    for standing in table.ranking[1:]:
        verdict = judge(sides[f"{order[0]}-s0"], sides[f"{standing.name}-s0"], list(sides.values()))
        assert standing.verdict == verdict.word
        assert standing.against_best and vars(standing.against_best) == pytest.approx(vars(verdict.change))
    page, _ = board(runs)
    assert f"Best: **{order[0]}**" in page and "1 of 2 others within noise of it" in page
    assert "Between seeds of a setting the loss varies by" in page


def test_a_rank_sweep_under_one_alpha_says_that_it_sweeps_strengths(caplog: pytest.LogCaptureFixture) -> None:
    """The sweep of docs/sweeps.md, with null and with the number that once was the default."""
    caplog.set_level("INFO", "lora-dag")
    for alpha, said in ((None, False), (8, True)):
        caplog.clear()
        runs = planted(grid={"lora.rank": [4, 8, 16], "lora.alpha": [alpha]})
        for run in runs:
            write_run(run)
        page, rows = board(runs)
        headline = next(line for line in page.splitlines() if line.startswith("Best: "))
        assert headline.endswith(". `lora.alpha=null` keeps it at 1.") == said
        assert ("**Strength differs too**: alpha / rank is 0.5, 1, 2, so this compares" in headline) == said
        assert ("Strength differs too: alpha / rank is 0.5, 1, 2" in caplog.text) == said
        notes = {row["lora.rank"]: row["differs_too"].partition(", so")[0] for row in rows}
        strengths = {"4": "2 against 0.5", "8": "1 against 0.5"} if said else {"4": "", "8": ""}
        expected = {rank: text and f"Strength differs too: alpha / rank is {text}" for rank, text in strengths.items()}
        assert notes == expected | {"16": ""}  # the best
        assert "lora.alpha" not in rows[0]  # one value for all runs, null too, is nothing that was swept


def test_the_best_is_qualified_by_concerns_and_few_images() -> None:
    runs = planted(grid={"lora.rank": [8, 16]}, seeds=[0, 1])
    for run in runs:
        write_run(run, names=IMAGES[:4])
        measured = {"drift.loss": 0.368, "drift.loss_base": 0.0335, "drift.loss_change_low": 0.26}
        write_json(Path(run.folders["reports"]) / "metrics.json", measured)
    page, _ = board(runs)
    headline = next(line for line in page.splitlines() if line.startswith("Best: "))
    assert (
        " against the base, but loss on the base's own images is 11 times as high as with the base (0.0335" in headline
    )
    assert headline.endswith("within noise of it. 4 held-out images are too few for a verdict. Hold out more images.")
    assert "(percentile bootstrap, stretched to Student's width)" in page


def test_without_a_second_seed_the_page_says_what_the_intervals_leave_out() -> None:
    runs = planted(grid={"lora.rank": [4, 8]})
    for run in runs:
        write_run(run)
    page, rows = board(runs)
    assert "**Seed noise is not in these intervals**: no setting has a second seed (`sweep.seeds`)." in page
    assert [row["seed_sd"] for row in rows] == ["", ""]


def test_a_metric_with_a_column_is_in_csv_and_both_tables() -> None:
    """A mean over seeds in the table of settings; empty where a run lacks it."""
    runs = planted(grid={"lora.rank": [4, 8]}, seeds=[0, 1])
    for run, share in zip(runs, (0.25, 0.75, 0.5, None), strict=True):
        write_run(run)
        write_json(Path(run.folders["reports"]) / "metrics.json", {"samples.copied_share": share})
    page, rows = board(runs)
    assert {row["run"]: row["copied_share"] for row in rows} == {
        "raw/rank-4-s0": "0.25",
        "raw/rank-4-s1": "0.75",
        "raw/rank-8-s0": "0.5",
        "raw/rank-8-s1": "",
    }
    settings, runs_table = (text.partition("\n\n")[0] for text in re.split("(?=\\| setting)|(?=\\| run)", page)[1:])
    for text, expected in ((settings, ["", "50%"]), (runs_table, ["50%", "", "25%", "75%"])):
        head, _, *lines = (line.split(" | ") for line in text.splitlines())
        assert [line[head.index("copied share")] for line in lines] == expected


def test_fronts_are_those_of_comparing_each_with_each() -> None:
    runs = planted(grid={"lora.rank": [4, 8, 16, 32]})
    for run in runs:
        write_run(run)
    (table,) = ranked(runs)
    settings = make_board([table], []).settings
    cost = {standing.name: MEGABYTES[standing.results[0].run.value("lora.rank")] for standing in table.ranking}
    loss = {standing.name: standing.loss for standing in table.ranking}
    front = {a for a in cost if not any(b != a and loss[b] <= loss[a] and cost[b] <= cost[a] for b in cost)}
    names = {name for name, found in zip(cost, settings["front"], strict=True) if "size" in found}
    assert names == front and [*settings["megabytes"]] == [*cost.values()]
    assert front == {"raw/rank-4", "raw/rank-8", "raw/rank-16"}  # 32 is larger and worse than 16
    _, rows = board(runs)
    assert {row["run"]: row["front"] for row in rows}["raw/rank-32-s0"] == ""


def test_a_front_has_all_points_that_none_dominates() -> None:
    """Of equal losses, as of two exports of one training, only the smaller file; of points in one place, all."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = [(float(cost), float(loss)) for cost, loss in rng.integers(0, 5, (8, 2))]
        free = [
            i
            for i, own in enumerate(points)
            if not any(a <= own[0] and b <= own[1] and (a, b) != own for a, b in points)
        ]
        assert sorted(front(*zip(*points, strict=True))) == free


def test_one_training_exported_twice_is_equal_and_the_smaller_file_is_on_the_front() -> None:
    runs = planted(grid={"export.seed": [0, 1]}, seeds=[0, 1])
    for run in runs:
        write_run(run)
        if run.value("export.seed") == 1:
            write_json(Path(run.folders["export_reports"], "metrics.json"), {"export.megabytes": 1.0})
    page, rows = board(runs)
    found = {(row["export.seed"], row["verdict"], "size" in row["front"].split()) for row in rows}
    names = {verdict for _, verdict, _ in found}
    assert names == {"best", "equal"}
    assert {(number, size) for number, _, size in found} == {("0", False), ("1", True)}
    assert "1 of 1 other within noise of it" in page


def test_each_setting_is_held_against_its_own_base() -> None:
    """Two denoisers with one VAE answer the same rows."""
    runs = planted(grid={"model.variant": [None, "fp16"]})
    for run in runs:
        write_run(run)
    path = Path(runs[1].folders["reports"], "validate/heldout.csv")
    path.write_text(re.sub(r",0\.8,", ",1.6,", path.read_text()))
    (table,) = ranked(runs)
    assert sorted(float(standing.base.mean()) for standing in table.ranking) == pytest.approx([0.8, 1.6])
    page, rows = board(runs)
    assert {row["loss_base"] for row in rows} == {"0.8", "1.6"}
    assert len(set(re.findall(r"(\S+) % \[", page.partition("| 1. ")[2]))) > 1


def test_no_time_front_where_a_time_is_missing() -> None:
    runs = planted(grid={"lora.rank": [4, 8]})
    for run in runs:
        write_run(run)
    Path(runs[0].folders["train_reports"], "run.json").unlink()
    settings = make_board(ranked(runs), []).settings
    assert settings["front"].tolist() == ["size", "size"] and settings["train_seconds"].isna().tolist() == [False, True]


def test_failed_and_unfinished_runs_are_named_with_their_reasons() -> None:
    runs = planted(grid={"lora.rank": [4, 8, 16]}, seeds=[0, 1])
    for run in runs[:4]:
        write_run(run)
    log = Path("runs/raw/rank-16-s0/logs/train.log")
    write_text(log, "device cpu\nerror: train: the loss is not a number at step 7 | lower the rate\nstopped\n")
    page, rows = board(runs)
    assert page.startswith("# Leaderboard: 4 of 6 runs finished\n")
    assert r"| raw/rank-16-s0 | `train: error: train: the loss is not a number at step 7 \| lower the rate` |" in page
    assert "| raw/rank-16-s1 | `train: not started` |" in page
    assert len(rows) == 6
    assert {row["run"]: row["state"] for row in rows}["raw/rank-16-s1"] == "not finished"


def test_a_run_of_other_parameters_than_the_plan_s_is_not_ranked() -> None:
    runs = planted(grid={"lora.rank": [4, 8]})
    for run in runs:
        write_run(run)
    (edited, _) = planted(grid={"lora.rank": [4, 8]}, rows=[])
    write_json(
        Path(edited.folders["export_reports"], "lineage.json"),
        {"adapter": "0" * 64, "lora": {"rank": 5}, "train": {"seed": 0}},
    )
    page, _ = board(runs)
    reason = "other settings than planned: lora.rank was 5 and is 4, its reports belong to two trainings."
    assert f"| raw/rank-4-s0 | `` {reason} Run `snakemake` again. `` |" in page


def test_damaged_reports_and_losses_that_are_no_numbers_are_named() -> None:
    runs = planted(grid={"lora.rank": [4, 8, 16]})
    for run in runs:
        write_run(run)
    Path(runs[0].folders["reports"], "validate/lineage.json").write_text("{")
    path = Path(runs[1].folders["reports"], "validate/heldout.csv")
    path.write_text(path.read_text().replace(path.read_text().splitlines()[1].rpartition(",")[2], "nan"))
    page, rows = board(runs)
    assert "| raw/rank-4-s0 | `` damaged reports (" in page
    assert "| raw/rank-8-s0 | `validate: a held-out loss is not a number` |" in page
    assert [row["run"] for row in rows if row["state"] == "finished"] == ["raw/rank-16-s0"]


def test_a_run_without_held_out_rows_a_sheet_or_plain_numbers_stops_no_other() -> None:
    runs = planted(grid={"lora.rank": [4, 8, 16, 32]})
    for run in runs:
        write_run(run)
    path = Path(runs[0].folders["reports"], "validate/heldout.csv")
    path.write_text(path.read_text().replace(",heldout,", ",train,"))
    Path(runs[1].folders["reports"], "samples.png").write_bytes(b"half")
    Path(runs[2].folders["reports"], "metrics.json").write_text(f'{{"val.overfit_gap": {10**400}}}')
    page, rows = board(runs)
    assert "| raw/rank-4-s0 | `validate: reports/validate/heldout.csv has no held-out row` |" in page
    assert "| raw/rank-8-s0 | `` damaged reports (raw/rank-8-s0: reports/samples.png is damaged" in page
    assert "| raw/rank-16-s0 | `` damaged reports (val.overfit_gap is beyond 64 bits)" in page
    assert [row["run"] for row in rows if row["state"] == "finished"] == ["raw/rank-32-s0"]


def test_datasets_without_a_row_in_common_have_a_table_each() -> None:
    runs = planted(datasets=["data/raw", "data/raw-noto"], grid={"lora.rank": [4, 8]})
    for run in runs:
        write_run(run, dataset=run.value("dataset.source"))
    tables = ranked(runs)
    assert [table.datasets for table in tables] == [["data/raw"], ["data/raw-noto"]]
    page, rows = board(runs)
    assert "## data/raw-noto: 12 held-out images" in page
    assert [(row["table"], row["rank"], row["verdict"]) for row in rows] == [
        ("1", "1", "best"),
        ("1", "2", "worse"),
        ("2", "1", "best"),
        ("2", "2", "worse"),
    ]


def test_datasets_that_share_images_are_compared_on_those() -> None:
    """The other images of each are easy there: without pairing, the worse setting would win."""
    runs = planted(datasets=["data/raw", "data/other"])
    runs = [run for run in runs if run.value("lora.rank") == 8]
    write_run(runs[0])
    write_run(runs[1], shift=0.05)
    path = Path(runs[1].folders["reports"], "validate/heldout.csv")
    easy = "".join(f"easy-{i},easy-{i}.png,heldout,100,0.8,0.0001\n" for i in range(40))
    path.write_text(path.read_text() + easy)
    (table,) = ranked(runs)
    assert table.num_images == 12
    assert [standing.name for standing in table.ranking] == ["raw/default", "other/default"]


def test_a_chance_overlap_of_two_splits_does_not_decide_for_all() -> None:
    runs = planted(datasets=["data/raw", "data/other"])
    write_run(runs[0])
    write_run(runs[1], [*IMAGES[:3], *(f"own-{i}.png" for i in range(9))])
    assert [table.num_images for table in ranked(runs)] == [12, 12]
    write_run(runs[1], [*IMAGES[:6], *(f"own-{i}.png" for i in range(6))])
    assert [table.num_images for table in ranked(runs)] == [6]


def test_tables_of_one_dataset_are_told_apart_by_what_was_swept() -> None:
    runs = planted(grid={"dataset.resolution": [32, 64], "lora.rank": [4, 8]})
    for run in runs:
        write_run(run, dataset=str(run.value("dataset.resolution")))
    page, _ = board(runs)
    headings = [f"## data/raw, dataset.resolution {size}: 12 held-out images" for size in (32, 64)]
    assert re.findall(r"^## data.*", page, re.MULTILINE) == headings


def test_every_run_has_its_interval_over_images() -> None:
    (run,) = planted()
    write_run(run)
    page, (row,) = board([run])
    cells = page.splitlines()[-1].split(" | ")
    values = [100 * float(row[f"change{bound}"]) / BASE for bound in ("", "_low", "_high")]
    assert cells[2].replace("\N{MINUS SIGN}", "-") == "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*values)
    assert cells[-4:-1] == ["25%", "800", "2"]


def test_a_sheet_without_room_for_all_says_so_and_has_rows_of_every_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_ROWS", 4)
    monkeypatch.setattr(images, "MAX_KEYS", 1)
    grid = {"lora.rank": [4, 8, 16], "lora.alpha": [8]}
    runs = planted(datasets=["data/raw", "data/raw-noto"], grid=grid, rows=[{"lora.rank": 32, "lora.alpha": 4}])
    for run in runs:
        write_run(run, dataset=run.value("dataset.source"))
    page, _ = board(runs)
    assert "![contact](contact.png)\n\nWithout 4 settings: the best 2 of each table are drawn." in page
    assert "![leaderboard](leaderboard.png)\n\nWithout lora.alpha: at most 1 key is drawn." in page
    with Image.open("reports/sweep/contact.png") as image:
        assert 4 * 64 < image.height < 6 * 64


def test_the_same_runs_give_the_same_bytes() -> None:
    runs = planted(grid={"lora.rank": [4, 8]}, seeds=[0, 1])
    for run in runs:
        write_run(run)
    digests = []
    for _ in range(2):
        board(runs)
        files = sorted(Path("reports/sweep").iterdir())
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"leaderboard.md", "leaderboard.csv", "leaderboard.png", "contact.png"}


def test_before_the_first_run_it_says_what_to_do() -> None:
    with refused("sweep-not-started", "1 run", "`snakemake`"):
        command.run("leaderboard", "--params", str(REPOSITORY / "params.yaml"))


def test_labels_of_plots_are_legible_and_never_alike() -> None:
    """Values of a swept key that share their first 24 letters were one label, and $...$ was read as mathematics."""
    long = "a photo of a very old red house in the forest at night, "
    assert fit_labels([long + "winter", long + "summer", "café 漢", "$x$"], 200) == [
        *("… winter", "… summer", "café U+6F22", "$x$")
    ]
    assert fit_labels(["a b", "a  b"], 200) == ["1. a b", "2. a b"]
