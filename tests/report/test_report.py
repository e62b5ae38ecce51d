"""The pages: honest verdicts, working links, equal bytes, and what a person may want to mend in the dataset."""

from __future__ import annotations

import re
from typing import Any

import pytest
from PIL import Image

from lora_dag.artifacts import image_table, metrics
from lora_dag.artifacts.lineage import save as save_lineage
from lora_dag.core.console import UserError
from lora_dag.core.files import write_text
from stages.report import page as report
from stages.report.plots import smooth
from tests.helpers.errors import assert_problem
from tests.helpers.reports import DATASET, LATENTS, LINEAGE, MEASURED, ROWS, row, write_reports
from tests.helpers.workspace import Workspace


def of(num_heldout: int = 25, num_images: int = 300, **validate: Any) -> dict[str, Any]:
    """lineage.json of a run with so many held-out images, and 24 samples."""
    return LINEAGE | {
        "dataset": {"heldout": num_heldout, "train": num_images - num_heldout},
        "neighbors": {"num_heldout": num_heldout, "threshold": 0.3},
        "table": LINEAGE["table"] | {"num_images": {"heldout": num_heldout, "train": num_heldout}},
        "validate": LINEAGE["validate"] | {"prompts": [f"{index}" for index in range(8)], "num_seeds": 3} | validate,
    }


def verdict(measured: dict[str, Any], lineage: dict[str, Any]) -> str:
    return " ".join(report.verdict_sentences(measured, lineage))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {},
            "learned the style. Held-out loss fell by 0.0400 (−31 %), 95 % interval [−0.0450, −0.0350]. No sign",
        ),
        (
            {"val.loss_change_high": 0.001},
            "No difference: 25 held-out images show no change beyond noise. Held-out loss changed by −0.0400",
        ),
        (
            {"val.loss_change": 0.01, "val.loss_change_low": 0.005, "val.loss_change_high": 0.02},
            "on held-out images. Held-out loss rose by 0.0100 (+7.7 %), 95 % interval [+0.0050, +0.0200].",
        ),
        (
            {"val.overfit_gap": 0.02, "val.overfit_gap_low": 0.01, "val.overfit_gap_high": 0.03, "val.best_step": 2},
            "overfits: training images gained 0.0200 [+0.0100, +0.0300] more than held-out images, and held-out "
            "loss was lowest at step 2 of 4.",
        ),
        (
            {"val.overfit_gap": 0.02, "val.overfit_gap_low": 0.01, "val.overfit_gap_high": 0.03},
            "gained 0.0200 [+0.0100, +0.0300] more than held-out images, but held-out loss is lowest at the end.",
        ),
        ({"val.onset_step": 3, "val.best_step": 2}, "But it overfits from step 3 on (lowest held-out loss at step 2)."),
        ({"val.overfit_gap_low": None, "val.overfit_gap_high": None}, "No sign of overfitting."),
        (
            {"val.loss_change": -3e-5, "val.loss_change_low": -4e-5, "val.loss_change_high": -2e-5},
            "fell by 0.000030 (−0.023 %), 95 % interval [−0.000040, −0.000020].",
        ),
        (
            {"val.loss_change": -2e-7, "val.loss_change_low": -0.01, "val.loss_change_high": 0.01},
            "changed by 0.0000 (−0.00015 %), 95 % interval [−0.0100, +0.0100].",
        ),
    ],
)  # fmt: skip
def test_verdict_claims_no_more_than_the_intervals(changes: dict[str, Any], words: str) -> None:
    assert words in verdict(MEASURED | changes, of())


@pytest.mark.parametrize(
    ("lineage", "suggestion"),
    [
        (of(3, 33), "3 held-out images are too few for a verdict. Set dataset.heldout_fraction=0.35."),
        (of(2, 13), "2 held-out images are too few for a verdict. Set dataset.heldout_fraction=0.5 or add images."),
        (of(9, 90), "9 held-out images are too few for a verdict. Set dataset.heldout_fraction=0.15."),
        (of(1, 40), "1 held-out image is too few for a verdict. Set dataset.heldout_fraction=0.25."),
        (of(4) | {"dataset": {"heldout": 40, "train": 360}}, "too few for a verdict. Set validate.max_images=40."),
    ],
)
def test_few_held_out_images_get_a_suggestion(lineage: dict[str, Any], suggestion: str) -> None:
    changes = {"val.loss_change_low": None, "val.loss_change_high": None}
    if lineage["table"]["num_images"]["heldout"] > 1:
        changes = {"val.loss_change_low": -0.09, "val.loss_change_high": 0.01}
    said = verdict(MEASURED | changes, lineage)
    assert said.endswith(suggestion) and "No difference" not in said and "nan" not in said


def test_suggestion_with_a_named_split_has_no_fraction(workspace: Workspace) -> None:
    """The two settings exclude each other."""
    write_reports(workspace.path / "reports")
    few = {"val.loss_change_low": -0.09, "val.loss_change_high": 0.01}
    metrics.save(workspace.path / "reports/metrics.json", MEASURED | few)
    made_from = LINEAGE | {name: of(3, 33)[name] for name in ("dataset", "table")}
    save_lineage(workspace.path / "reports/validate/lineage.json", made_from)
    named = ("--set", "dataset.heldout_split=test", "--set", "dataset.heldout_fraction=null")
    for arguments, suggestion in (((), "Set dataset.heldout_fraction=0.35."), (named, "Hold out more images.")):
        (line,) = [line for line in workspace.run("report", *arguments) if line.startswith("verdict ")]
        assert line.endswith(f" {suggestion}")


def test_few_held_out_images_do_not_exclude_overfitting() -> None:
    said = verdict(MEASURED, of(4))
    assert "4 held-out images are too few to detect overfitting." in said and "No sign" not in said
    assert "The adapter learned" not in said


DRIFT = {"drift.loss": 0.368118, "drift.loss_base": 0.0334711, "drift.loss_change_low": 0.258}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (DRIFT, "loss on the base's own images is 11 times as high as with the base (0.0335 → 0.3681)."),
        ({"drift.loss": 0.2100, "drift.loss_base": 0.2, "drift.loss_change_low": 0.01}, "is 1.05 times as high"),
        (
            {"samples.copied_share": 0.125, "samples.copied_share_base": 0.0},
            "3 of 24 samples count as copies of training images (1.2 by chance, base: 0; 24 samples do not exclude "
            "chance).",
        ),
        (
            {"samples.copied_share": 1 / 3, "samples.copied_share_base": 1 / 24},
            "8 of 24 samples count as copies of training images (1.2 by chance, base: 1).",
        ),
        (
            {"samples.far_share": 0.75, "samples.far_share_base": 0.0},
            "18 of 24 samples count as unlike any image of the dataset (1.2 by chance, base: 0).",
        ),
        ({"samples.blank_share": 1.0, "samples.blank_share_base": 0.0}, "24 of 24 samples count as blank ("),
        ({"samples.diversity": 0.1, "samples.diversity_base": 0.5}, "of one prompt differ only 0.2 times as much as"),
        ({"val.onset_step": 2, "val.best_step": 1}, "it overfits from step 2 on (lowest held-out loss at step 1)"),
    ],
)  # fmt: skip
def test_verdict_has_each_concern(changes: dict[str, Any], words: str) -> None:
    said = verdict(MEASURED | {"val.onset_step": None} | changes, of())
    good, _, bad = said.partition(" But ")
    assert words in bad and "better than the base on images like these" in good and "learned the style" not in good


@pytest.mark.parametrize(
    "changes",
    [
        DRIFT | {"drift.loss_change_low": -0.01},
        {"samples.copied_share": 0.04, "samples.copied_share_base": 0.0},
        {"samples.copied_share": 0.25, "samples.copied_share_base": 0.25},
        {"samples.far_share": 0.125, "samples.far_share_base": 0.0},  # 3 of 24, as chance may give
        {"samples.far_share": 0.75, "samples.far_share_base": 0.75},  # the base draws another style
        {"samples.diversity": 0.3, "samples.diversity_base": 0.5},
        {"samples.blank_share": 0.0, "samples.blank_share_base": 0.0},
        {"samples.copied_share": None, "samples.far_share": None, "samples.diversity": None},
    ],
)
def test_verdict_without_concerns(changes: dict[str, Any]) -> None:
    said = verdict(MEASURED | changes, of())
    assert said.startswith("The adapter learned the style. ") and said.endswith(" No sign of overfitting.")


def test_a_broken_adapter_is_never_simply_better() -> None:
    """Black noise, a third of it near a training image: the loss alone was fine."""
    broken = (
        MEASURED | DRIFT | {"samples.copied_share": 1 / 3, "samples.copied_share_base": 0.0, "samples.far_share": 0.5}
    )
    said = verdict(broken | {"samples.far_share_base": 0.0}, of())
    assert re.search("better than .* But 8 of 24 samples .*\\. 12 of 24 samples .*\\. Loss on the base's own", said)
    worse = {"val.loss_change": 0.01, "val.loss_change_low": 0.005, "val.loss_change_high": 0.02}
    text = verdict(broken | worse, of())
    assert "is worse than the base" in text and "No sign of overfitting. 8 of 24" in text


def test_page_has_links_that_exist_and_no_path_of_this_machine(workspace: Workspace) -> None:
    write_reports(workspace.path / "reports")
    workspace.run("report")
    page = (workspace.path / "reports" / "report.md").read_text()
    links = re.findall(r"!\[[^]]*]\(([^)]+)\)", page)
    assert sorted(links) == ["dataset/contact.png", "loss.png", "progress.png", "samples.png"]
    assert "[The dataset page](dataset.md)" in page and (workspace.path / "reports" / "dataset.md").is_file()
    assert all((workspace.path / "reports" / link).is_file() for link in links)
    assert str(workspace.path) not in page
    assert "/tmp" not in page and "nan" not in page and "None" not in page
    for words in (
        "107,520",
        "`to_q`",
        "`aaaaaaaaaaaa`",
        "1.5e-07",
        "| Adapter size | 0.43 MB |",
        "| Images seen | 64 |",
        "(v_prediction)",
        "| Chroma of the samples, 0 to 255 | 120 | 18 | 1.5 |",
    ):
        assert words in page


def test_links_are_relative_when_reports_stand_elsewhere(workspace: Workspace) -> None:
    write_reports(workspace.path / "runs" / "a" / "reports")
    (workspace.path / "runs" / "a" / "reports" / "dataset").rename(workspace.path / "runs" / "the dataset")
    paths = {"reports": "", "train-reports": "/train", "export-reports": "/export"}
    arguments = [word for name, tail in paths.items() for word in (f"--{name}", f"runs/a/reports{tail}")]
    arguments += ["--latents-reports", "runs/a/reports/latents", "--dataset-reports", "runs/the dataset"]
    workspace.run("report", *arguments)
    for name in ("report.md", "dataset.md"):
        page = (workspace.path / "runs/a/reports" / name).read_text()
        assert "![Contact sheet](../../the%20dataset/contact.png)" in page
    assert "[images.csv](../../the%20dataset/images.csv)" in page


def test_bytes_are_equal_between_runs(workspace: Workspace) -> None:
    write_reports(workspace.path / "reports")
    workspace.run("report")
    first = workspace.tree("reports")
    workspace.run("report")
    assert workspace.tree("reports") == first
    assert len(first["loss.png"]) < 200_000


def test_page_without_pixel_measures_and_intervals(workspace: Workspace) -> None:
    write_reports(workspace.path / "reports")
    few = {name: value for name, value in MEASURED.items() if not name.startswith("samples.")}
    missing = {f"val.{name}_{bound}": None for name in ("loss_change", "overfit_gap") for bound in ("low", "high")}
    metrics.save(workspace.path / "reports" / "metrics.json", few | missing | {"val.loss_mid_noise": None})
    workspace.run("report")
    page = (workspace.path / "reports" / "report.md").read_text()
    assert "Chroma" not in page and "nan" not in page and "None" not in page


EVIDENCE: dict[str, Any] = {
    "val.onset_step": 2,
    "val.final_minus_best": 0.01,
    "val.final_minus_best_low": 0.002,
    "val.final_minus_best_high": 0.018,
    "drift.loss": 0.25,
    "drift.loss_base": 0.2,
    "drift.loss_change": 0.05,
    "drift.loss_change_low": 0.04,
    "drift.loss_change_high": 0.06,
    "samples.copied_share": 0.25,
    "samples.copied_share_base": 0.0,
    "samples.nearest_distance": 0.4,
    "samples.nearest_distance_base": 0.9,
    "samples.diversity": 0.7,
    "samples.diversity_base": 0.8,
    "cost.tflop_per_image": 0.0125,
}
NEIGHBORS = {"space": "latents", "num_training_views": 6, "num_heldout": 2, "heldout_median": 0.8, "threshold": 0.35}


def test_evidence_is_shown_where_it_was_measured(workspace: Workspace) -> None:
    reports = workspace.path / "reports"
    write_reports(reports)
    metrics.save(reports / "metrics.json", MEASURED | EVIDENCE | {"val.best_step": 2})
    save_lineage(reports / "validate" / "lineage.json", LINEAGE | {"neighbors": NEIGHBORS})
    write_text(reports / "validate" / "nearest.csv", "prompt,seed\n")
    Image.new("RGB", (8, 8)).save(reports / "validate" / "nearest.png")
    workspace.run("report")
    page = (reports / "report.md").read_text()
    for words in (
        "| Drift: loss on images of the base model | 0.2000 | 0.2500 | +0.0500 [+0.0400, +0.0600] |",
        "| Copies of training images, share | 0 | 0.25 |  |",
        "| Distance to the nearest training image | 0.9 | 0.4 | 0.8 |",
        "| Distance between samples of one prompt | 0.8 | 0.7 |  |",
        "- Distances are between latents.",
        "- A sample nearer than 0.35 to one of 6 training views counts as a copy. 2 held-out images are too few",
        "| Lowest held-out loss | at step 2 of 4. The last step has +0.0100 [+0.0020, +0.0180]. `export.step=2`",
        "| Overfitting starts | at step 2 |",
        "| Arithmetic per training image | 0.0125 TFLOP, 0.8 in all |",
        "![Nearest training images](validate/nearest.png)",
        "[nearest.csv](validate/nearest.csv)",
    ):
        assert words in page
    card = (reports / "model_card.md").read_text()
    assert "A share of 0.25 of the samples (base: 0) is as near to a training image" in card


def test_unmeasured_metrics_are_left_out(workspace: Workspace) -> None:
    reports = workspace.path / "reports"
    write_reports(reports)
    nothing = {name: None for name in ("val.onset_step", "samples.copied_share", "samples.copied_share_base")}
    metrics.save(reports / "metrics.json", MEASURED | nothing)
    workspace.run("report")
    page = (reports / "report.md").read_text()
    assert "| Overfitting starts | at no snapshot |" in page
    assert not any(word in page for word in ("Drift", "Copies", "Nearest", "TFLOP", "nan", "None"))
    assert "Copies of training images were not measured" in (reports / "model_card.md").read_text()


def test_layers_are_counted_by_the_rank_that_they_use(workspace: Workspace) -> None:
    reports = workspace.path / "reports"
    write_reports(reports)
    workspace.run("report")
    page = (reports / "report.md").read_text()
    assert "LoRA of rank 8 on `base` (sd): 4 steps over 6 images at 32 x 32." in page
    assert "2 of 3 adapted layers keep 90 % of the update" in page and "at rank 4 of 8 or less." in page
    assert "| `to_k` | 0 | 0 | 1 | 1 |\n| `to_q` | 1 | 1 | 0 | 2 |\n| all | 1 | 1 | 1 | 3 |" in page
    write_text(reports / "export" / "energy.csv", "layer,rank,energy\n")  # of an algorithm without ranks
    workspace.run("report")
    assert "Rank usage" not in (reports / "report.md").read_text()


def test_missing_reports_name_their_stages(workspace: Workspace) -> None:
    write_reports(workspace.path / "reports")
    (workspace.path / "reports" / "progress.png").unlink()
    (workspace.path / "reports" / "train" / "loss.csv").unlink()
    (workspace.path / "reports" / "dataset" / "images.csv").unlink()
    (workspace.path / "reports" / "latents" / "metrics.json").unlink()
    with pytest.raises(UserError) as error:
        workspace.run("report")
    assert set(error.value.codes) == {"report-missing"} and len(error.value.problems) == 4
    assert_problem(error.value, "report-missing", "reports/progress.png: ", "`python -m stages.validate`")
    assert_problem(error.value, "report-missing", "reports/train/loss.csv: ", "`python -m stages.train`")
    assert_problem(error.value, "report-missing", "reports/dataset/images.csv: ", "`python -m stages.prepare`")
    assert_problem(error.value, "report-missing", "reports/latents/metrics.json: ", "`python -m stages.cache_latents`")


def test_smoothing_averages_the_last_values() -> None:
    assert smooth([1.0, 2.0, 3.0, 7.0], 2) == [1.0, 1.5, 2.5, 5.0]


# The dataset


def pages(
    workspace: Workspace, rows: list[image_table.Row], latents: dict[str, Any], **dataset: Any
) -> tuple[str, str]:
    """report.md's section about the dataset, and dataset.md."""
    reports = workspace.path / "reports"
    write_reports(reports)
    metrics.save(reports / "dataset" / "metrics.json", DATASET | dataset)
    metrics.save(reports / "latents" / "metrics.json", LATENTS | latents)
    image_table.save(reports / "dataset" / "images.csv", rows)
    workspace.run("report")
    found = tuple((reports / name).read_text() for name in ("report.md", "dataset.md"))
    assert not any(word in page for page in found for word in ("nan", "None", "/tmp"))
    return found[0].split("## Dataset")[1].split("## Settings")[0], found[1]


def test_a_clean_dataset_has_no_remarks(workspace: Workspace) -> None:
    section, page = pages(workspace, ROWS, {})
    assert "To check" not in section
    assert "No problems: " in page
    assert "**8 images: 6 for training, 2 held out.**" in page
    assert "| Tokens per caption, median and maximum | 5.5 and 11 |" in page
    assert "| Sizes after resize and crop | 32 x 32 |" in section
    assert "| 32 x 32 | 1.00 | 6 | 2 | 0 |" in page
    for absent in ("Repeats", "Duplicates", "## Left out", "Masks", "regularization"):
        assert absent not in page + section


@pytest.mark.parametrize(
    ("rows", "latents", "dataset", "line"),
    [
        ([], {"captions.num_cut": 3}, {}, "Captions cut at 77 tokens: 3 of 9. The model never sees the rest."),
        ([row("x.png", captions=" ")], {}, {}, "Empty captions: 1. These images are learned without a prompt."),
        (
            [row("x.png", split="left out", reason="bad")],
            {},
            {"num_left_out": 1},
            "Images left out because of a problem: 1.",
        ),
        (
            [row("x.png", split="left out", near_duplicates="0.png", reason="near-duplicate")],
            {},
            {"num_left_out": 1},
            "Near-duplicates left out: 1. They look like images of the other split.",
        ),
        ([row("x.png", sha256="1.png")], {}, {}, "Images with the same bytes as another image: 1. They count twice."),
        (
            [row("x.png", width="640", height="64")],
            {},
            {},
            "Images that lose over a third of their area to the crop: 1. The largest loss is 90%.",
        ),
        (
            [row("x.png", captions="a (fox:1.2)")],
            {},
            {},
            "Captions with special syntax of other programs: 1. It is learned as plain text.",
        ),
        ([], {}, {"num_unlisted": 4}, "Images in the source without a row: 4. They are left out."),
    ],
)
def test_remarks_are_on_both_pages(
    workspace: Workspace, rows: list[image_table.Row], latents: dict[str, Any], dataset: dict[str, Any], line: str
) -> None:
    section, page = pages(workspace, ROWS + rows, latents, **dataset)
    assert f"To check:\n\n- {line}\n\n" in section
    assert f"\n\n- {line}\n\n" in page


def test_sizes_are_counted_wide_to_tall(workspace: Workspace) -> None:
    rows = [
        *ROWS,
        row("wide.png", bucket="48x24", width="32", height="16"),
        row("tall.png", bucket="24x48", width="32"),
    ]
    section, page = pages(workspace, rows, {})
    lines = [line for line in page.splitlines() if " x " in line]
    assert lines == [
        "| 48 x 24 | 2.00 | 1 | 0 | 1 |",
        "| 32 x 32 | 1.00 | 6 | 2 | 0 |",
        "| 24 x 48 | 0.50 | 1 | 0 | 0 |",
    ]
    assert "The largest enlargement is by a factor of 1.50." in page
    assert "| Sizes after resize and crop | 3 |" in section


def test_repeats_and_regularization(workspace: Workspace) -> None:
    rows = [*ROWS, row("x.png", repeats="4"), row("y.png", repeats="4", split="heldout")]
    section, page = pages(workspace, rows, {}, num_regularization=2)
    assert "| 4 | 1 | 4 |\n| 1 | 6 | 6 |\n| all | 7 | 10 |" in page
    assert "6 for training (2 of them for regularization), 2 held out" in page
    assert "| for regularization, among these | 2 |" in section


def test_what_the_crop_takes_and_what_captions_hold(workspace: Workspace) -> None:
    rows = [
        *ROWS,
        row("pano.png", width="640", height="64", num_captions="3", captions="a {red|blue} fox <lora:ink:1>"),
        row("wide.png", width="128", height="64", num_captions="3", captions="a {a|b}"),
        row("camera.png", width="96", height="64"),
    ]
    _, page = pages(workspace, rows, {})
    cut = page.split("## Cropped")[1].split("## ")[0]
    assert [line for line in cut.splitlines() if line.startswith("| `")] == [
        "| `pano.png` | 640 x 64 | 32 x 32 | 90% |",
        "| `wide.png` | 128 x 64 | 32 x 32 | 50% |",
    ]
    assert "| Captions per image, median and maximum | 1 and 3 |" in page
    assert "| Captions with `{a\\|b}` | 2 |" in page and "| Captions with `<lora:...>` | 1 |" in page


def test_duplicates_name_their_sides(workspace: Workspace) -> None:
    near = {"near_duplicates": "a.png"}
    rows = [
        *ROWS,
        row("twin.png", sha256="1.png"),
        row("a.png", **near),
        row("b.png", split="left out", reason="near-duplicate of a.png", **near),
        *[row(f"copy-{i:02}.png", sha256="0.png") for i in range(20)],
    ]
    _, page = pages(workspace, rows, {})
    assert "| same bytes | `1.png` (train), `twin.png` (train) |" in page
    assert "| near-duplicates | `a.png` (train), `b.png` (left out) |" in page
    assert "`copy-08.png` (train), and 11 more |" in page
    assert "| `b.png` | `near-duplicate of a.png` |" in page


def test_long_lists_are_cut_and_text_of_the_dataset_is_no_markup(workspace: Workspace) -> None:
    reason = "rows:3: '<img src=x> | `y`' is damaged"
    rows = [*ROWS, *[row(f"bad-{i:03}.png", split="left out", reason=reason) for i in range(60)]]
    _, page = pages(workspace, rows, {}, num_left_out=60)
    assert page.count("| `bad-") == 40
    assert "And 20 more in [images.csv](dataset/images.csv)." in page
    assert "`` rows:3: '<img src=x> \\| `y`' is damaged `` |" in page


@pytest.mark.parametrize(
    ("name", "text", "stage"),
    [
        ("dataset/images.csv", "nonsense\n", "prepare"),
        ("train/loss.csv", f"step,loss\n1,{'9' * 200_000}\n", "train"),  # csv.Error, no ValueError
        ("train/loss.csv", "step,loss\n1\n", "train"),
        ("validate/curve.csv", "step,heldout,train_probe\n\0,x,y\n", "validate"),
        ("export/energy.csv", f"layer,rank,energy\n{'a' * 200_000},1,1\n", "export"),
        ("export/lineage.json", "[1]", "export"),
    ],
)
def test_a_damaged_file_names_its_stage(workspace: Workspace, name: str, text: str, stage: str) -> None:
    write_reports(workspace.path / "reports")
    (workspace.path / "reports" / name).write_text(text)
    with pytest.raises(UserError) as error:
        workspace.run("report")
    (problem,) = error.value.problems
    assert problem.startswith(f"reports/{name}: ") and f"`python -m stages.{stage}`" in problem


def test_pages_without_token_counts(workspace: Workspace) -> None:
    """Families whose encoders have no limit write no tokens."""
    write_reports(workspace.path / "reports")
    metrics.save(workspace.path / "reports/latents/metrics.json", {"latents.num_views": 8})
    workspace.run("report")
    page = (workspace.path / "reports/dataset.md").read_text()
    assert "Tokens" not in page and "nan" not in page and "None" not in page
