"""What differs beside what was changed is said beside the verdict; a setting alone is no such thing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lora_dag.commands.compare.confounds import confounds
from lora_dag.commands.compare.page import paragraph
from lora_dag.commands.compare.revision_report import RevisionReport, flatten
from lora_dag.commands.compare.run_inputs import differing_params, setting
from lora_dag.commands.compare.verdict import judge
from tests.helpers.revision_reports import side

SETTINGS: dict[str, Any] = {
    "lora": {"rank": 8, "alpha": None, "use_rslora": False, "rank_pattern": None, "alpha_pattern": None},
    "train": {
        "num_steps": 400,
        "batch_size": 16,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-3,
        "scale_lr": False,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 20,
        "seed": 0,
    },
}
RATIO, ROOT = "alpha / rank", "alpha / sqrt(rank)"
NULL = ". `lora.alpha=null` keeps it at 1."
RSLORA = ". `lora.alpha=null` without `lora.use_rslora` keeps it at 1."


def run(
    losses: tuple[float, ...] = (0.4, 0.5, 0.6), name: str = "new", metrics: Any = None, **changes: Any
) -> RevisionReport:
    """A run with some settings, such as ``lora_rank=16``."""
    tree = {section: dict(values) for section, values in SETTINGS.items()}
    for key, value in changes.items():
        section, _, setting = key.partition("_")
        tree[section][setting] = value
    return replace(side(losses), name=name, params=flatten(tree), metrics=metrics or {})


def told(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What is said of b against a."""
    return confounds(run(**b), run(name="old", **a))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({"lora_alpha": 8}, {"lora_alpha": 8, "lora_rank": 4}, f"alpha / rank is 2 against 1, so ... as ranks{NULL}"),
        ({"lora_alpha": 8}, {"lora_alpha": 8, "lora_rank": 12}, f"{RATIO} is 0.667 against 1, so ... as ranks{NULL}"),
        ({}, {"lora_alpha": 8, "lora_rank": 16}, f"alpha / rank is 0.5 against 1, so ... as ranks{NULL}"),
        ({}, {"lora_alpha": 4, "train_learning_rate": 1e-3}, f"alpha / rank is 0.5 against 1, so ... too{NULL}"),
        ({}, {"lora_use_rslora": True}, f"{RATIO} ({ROOT} with rsLoRA) is 2.83 against 1, so ... too{RSLORA}"),
        (
            {"lora_use_rslora": True, "lora_rank": 4},
            {"lora_use_rslora": True, "lora_rank": 16},
            f"alpha / sqrt(rank) is 4 against 2, so ... as ranks{RSLORA}",
        ),
        (
            {"lora_alpha": 8},
            {"lora_alpha": 8, "lora_rank_pattern": {"attn2.to_k": 16}},
            f"alpha / rank is 0.5 against 1 in attn2.to_k, so ... as ranks{NULL}",
        ),
        (
            {"lora_alpha": 8},
            {"lora_alpha": 8, "lora_rank": 4, "lora_rank_pattern": {"to_k": 2}},
            f"alpha / rank is 2 against 1 and 4 against 1 in to_k, so ... as ranks{NULL}",
        ),
        (
            {},
            {"lora_rank": 16, "lora_alpha_pattern": {"to_k": 8}},
            "alpha / rank is 0.5 against 1 in to_k, so ... as ranks. Without `lora.alpha_pattern` it is 1.",
        ),
        (  # alpha of to_k is that of its pattern, which the narrower attn2.to_k has too
            {"lora_alpha": 8, "lora_alpha_pattern": {"to_k": 4}},
            {"lora_alpha": 8, "lora_alpha_pattern": {"to_k": 4}, "lora_rank_pattern": {"attn2.to_k": 4}},
            f"alpha / rank is 1 against 0.5 in attn2.to_k, so ... as ranks{NULL}",
        ),
    ],
)  # fmt: skip
def test_a_strength_that_differs_is_said(a: dict[str, Any], b: dict[str, Any], expected: str) -> None:
    (sentence,) = told(a, b)
    expected = expected.replace("... as", "this compares strengths as well as").replace(
        "...", "this compares strengths"
    )
    assert sentence == f"**Strength differs too**: {expected}"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({}, {"lora_rank": 16}),  # alpha null
        ({"lora_alpha": 8}, {"lora_alpha": 16, "lora_rank": 16}),
        ({}, {"lora_rank_pattern": {"to_k": 2}}),
        ({}, {"lora_alpha": 4}),  # what is compared is the strength
        ({}, {"lora_alpha_pattern": {"to_k": 4}}),
        ({}, {"train_num_steps": 800}),
        ({}, {"train_num_steps": 800, "train_lr_warmup_steps": 40}),
        ({}, {"train_learning_rate": 1e-3}),
        ({"lora_rank": 4}, {"lora_rank": 8, "train_learning_rate": 1e-3}),
        ({}, {"train_lr_scheduler": "constant"}),
        ({}, {"train_batch_size": 4, "train_gradient_accumulation_steps": 4}),
        ({}, {"train_seed": 1}),
        ({}, {}),
    ],
)
def test_a_setting_that_is_compared_itself_is_no_confound(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert told(a, b) == []


CONSTANT = {"train_lr_scheduler": "constant", "train_lr_warmup_steps": 0}
TWICE = "12,800 against 6,400. `train.num_steps=200` for new makes them equal."
TWICE_AS_LONG = "cosine over 800 steps (20 of warmup) against cosine over 400 steps (20 of warmup)."
IMAGES, BATCH, SCHEDULE = (
    "**Images seen differ too**: ",
    "**The effective batch differs too**: ",
    "**The schedule differs too**: ",
)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({}, {"train_batch_size": 32}, [f"{IMAGES}{TWICE}"]),
        ({}, {"train_batch_size": 24}, [f"{IMAGES}9,600 against 6,400."]),  # no whole number of steps
        ({}, {"train_gradient_accumulation_steps": 2}, [f"{IMAGES}{TWICE}"]),
        (
            {},
            {"train_batch_size": 32, "train_num_steps": 200},
            [
                f"{BATCH}32 against 16.",
                f"{SCHEDULE}cosine over 200 steps (20 of warmup) against cosine over 400 steps (20 of warmup).",
            ],
        ),
        (
            CONSTANT,
            CONSTANT | {"train_batch_size": 32, "train_num_steps": 200},
            [f"{BATCH}32 against 16."],
        ),
        (
            {},
            {"lora_rank": 16, "train_num_steps": 800},
            [
                f"{IMAGES}12,800 against 6,400. `train.num_steps=400` for new makes them equal.",
                f"{SCHEDULE}{TWICE_AS_LONG}",
            ],
        ),
        (
            {"train_scale_lr": True},
            {"train_scale_lr": True, "train_batch_size": 32},
            [
                f"{IMAGES}{TWICE}",
                "**The learning rate differs too**: 0.064 against 0.032.",
            ],
        ),
        (  # the other one ended early
            {"metrics": {"train.images_seen": 4000}},
            {"lora_rank": 16, "metrics": {"train.images_seen": 6400}},
            [f"{IMAGES}6,400 against 4,000."],
        ),
    ],
)  # fmt: skip
def test_what_a_training_comes_to_is_said(a: dict[str, Any], b: dict[str, Any], expected: list[str]) -> None:
    assert told(a, b) == expected


def test_other_data_say_how_many_images_and_how_often_they_were_seen() -> None:
    def on(content: str, num: int, epochs: float) -> RevisionReport:
        own = {"train.images_seen": 6400, "train.epochs": epochs}
        plain = run(metrics=own)
        return replace(plain, lineage=plain.lineage | {"dataset": {"content": content, "train": num}})

    few, many = on("d", 31, 206.5), on("c", 275, 23.27)
    expected = (
        "**The number of training images differs too**: 31 against 275. They were seen in 206 against 23.3 epochs."
    )
    assert confounds(few, many) == [expected]
    assert confounds(few, on("e", 31, 206.5)) == []


def test_a_pattern_of_null_is_none() -> None:
    assert told({"lora_rank_pattern": None, "lora_alpha": 8}, {"lora_rank": 4, "lora_alpha": 8}) != []
    assert told({"lora_alpha_pattern": None}, {"lora_rank_pattern": {"to_k": 4}, "lora_alpha_pattern": None}) == []


def test_of_several_runs_each_value_stands_once() -> None:
    sides = [run(lora_rank=rank, lora_alpha=8) for rank in (4, 8, 16, 4)]
    (sentence,) = confounds(*sides)
    assert sentence.startswith("**Strength differs too**: alpha / rank is 2, 1, 0.5, so ")
    assert confounds(*(run(lora_rank=rank) for rank in (4, 8, 16))) == []


CROSSED = {"drift.loss": 0.368, "drift.loss_base": 0.0335, "drift.loss_change_low": 0.26}
DRIFT = "loss on the base's own images is 11 times as high as with the base (0.0335 → 0.3680)"


def test_better_is_qualified_by_concerns() -> None:
    clean, drifted = run(name="main"), run((0.1, 0.2, 0.4), "new", CROSSED, lora_rank=16)
    said = paragraph(clean, drifted, judge(clean, drifted))
    assert f"with one seed each. But {DRIFT}.**\n\n- Held-out loss" in said  # in bold, with the verdict
    said = paragraph(drifted, clean, judge(drifted, clean))
    assert "with one seed each.**\n\n- Held-out loss" in said and f"\n- **new**: {DRIFT}." in said
    again = replace(drifted, name="again")
    assert f"identical.**\n\n- **Both**: {DRIFT}." in paragraph(drifted, again, judge(drifted, again))


def test_the_verdict_has_it_beside_it_where_there_is_one() -> None:
    a, b = run(name="main", lora_alpha=8), run((0.1, 0.2, 0.4), "rank-4", lora_alpha=8, lora_rank=4)
    said = "\n- **Strength differs too**: alpha / rank is 2 against 1, so this compares strengths "
    assert said in paragraph(a, b, judge(a, b))
    assert "Strength" not in paragraph(a, a, judge(a, a))
    other = replace(b, scores=[replace(score, row=f"other {score.row}") for score in b.scores])
    assert "Strength" not in paragraph(a, other, judge(a, other))


def test_an_empty_mapping_and_null_are_one_setting() -> None:
    """Of revisions from before and after `null` in params.yaml."""
    assert told({"lora_rank_pattern": {}}, {}) == []
    assert differing_params(run(lora_rank_pattern={}), run()) == []
    assert setting(run(lora_rank_pattern={})) == setting(run())
