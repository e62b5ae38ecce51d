"""The plan of a sweep: which runs, in which folders, what they share, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lora_dag.commands.check_settings import sweep_problems
from lora_dag.core.console import PATHS, UserError
from lora_dag.core.files import write_json
from lora_dag.core.labels import as_yaml
from lora_dag.core.params import read_yaml
from lora_dag.sweeps import grid as sweep
from lora_dag.sweeps.snakemake import save_params
from stages.validate import feature_files
from tests.helpers.errors import assert_line, refused
from tests.helpers.workspace import REPOSITORY

EMPTY: dict[str, Any] = {"datasets": [], "grid": {}, "rows": [], "seeds": [], "exclude": []}


def tree(**changes: Any) -> dict[str, Any]:
    """The committed params.yaml with keys of its section sweep."""
    return read_yaml(REPOSITORY / "params.yaml") | {"sweep": EMPTY | changes}


def names(**changes: Any) -> list[str]:
    return [run.name for run in sweep.plan(tree(**changes))]


def problems(**changes: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        sweep.plan(tree(**changes))
    return list(error.value.problems)


def stage_folders(stage: str, **changes: Any) -> list[str]:
    return sorted({run.stage_folders[stage] for run in sweep.plan(tree(**changes))})


def test_the_committed_sweep_is_one_run_of_params_yaml() -> None:
    (run,) = sweep.plan(read_yaml(REPOSITORY / "params.yaml"))
    assert run.name == "raw/default-s0" and run.overrides == {}
    assert set(run.folders) == set(PATHS)
    assert len(set(run.folders.values())) == len(PATHS)
    assert all(path.startswith("runs/raw/") for path in run.folders.values())


def test_every_dataset_with_every_setting_and_seed() -> None:
    found = names(
        datasets=["data/raw", "data/raw-noto"],
        grid={"lora.rank": [4, 16], "train.learning_rate": [1e-4]},
        rows=[{"lora.use_rslora": True}],
        seeds=[0, 7],
    )
    settings = ["rank-4,learning_rate-0.0001", "rank-16,learning_rate-0.0001", "use_rslora-true"]
    assert found == [f"{d}/{s}-s{n}" for d in ("raw", "raw-noto") for s in settings for n in (0, 7)]


def test_rows_alone_are_the_settings() -> None:
    assert names(rows=[{}, {"lora.rank": 4}]) == ["raw/default-s0", "raw/rank-4-s0"]


def test_exclude_matches_overridden_and_default_values() -> None:
    grid = {"lora.rank": [4, 16], "lora.alpha": [4, 8]}
    assert names(grid=grid, exclude=[{"lora.rank": 4, "lora.alpha": 8}]) == [
        "raw/rank-4,alpha-4-s0",
        "raw/rank-16,alpha-4-s0",
        "raw/rank-16,alpha-8-s0",
    ]
    assert names(rows=[{}, {"lora.rank": 4}], exclude=[{"lora.rank": 8}]) == ["raw/rank-4-s0"]  # 8 is the default


def test_stages_with_equal_upstream_settings_share_a_folder() -> None:
    """The latents once for all ranks, a training once for all guidance scales, an export likewise."""
    ranks = {"lora.rank": [4, 8, 16], "validate.guidance_scale": [1.0, 2.0]}
    assert stage_folders("prepare", grid=ranks, seeds=[0, 1]) == ["raw"]
    assert stage_folders("cache_latents", grid=ranks, seeds=[0, 1]) == ["raw/latents"]
    assert (
        len(stage_folders("train", grid=ranks, seeds=[0, 1]))
        == len(stage_folders("export", grid=ranks, seeds=[0, 1]))
        == 6
    )
    assert len(stage_folders("validate", grid=ranks, seeds=[0, 1])) == 12
    variants = {"cache.num_variants": [1, 2], "lora.rank": [4, 8]}
    assert stage_folders("cache_latents", grid=variants) == [
        "raw/latents-num_variants-1",
        "raw/latents-num_variants-2",
    ]


def test_an_explicit_default_gives_the_same_run() -> None:
    """By value, not by name: rank 8 is what params.yaml says, so no second training of it."""
    assert names(rows=[{}, {"lora.rank": 8}, {"lora.rank": 4}]) == ["raw/default-s0", "raw/rank-4-s0"]
    rows = [{"lora.rank": 4}, {"lora.rank": 4, "dataset.resolution": 64}, {"lora.rank": 4, "dataset.resolution": 32}]
    assert stage_folders("prepare", rows=rows) == ["raw", "raw,resolution-32"]


def test_alpha_null_is_the_run_of_its_number_and_stays_null_for_the_stages() -> None:
    """As a number it would be the same alpha for every layer, whatever lora.rank_pattern says."""
    assert names(grid={"lora.rank": [4, 8], "lora.alpha": [None, 8]}) == [
        "raw/rank-4,alpha-null-s0",
        "raw/rank-4,alpha-8-s0",
        "raw/rank-8,alpha-null-s0",
    ]
    rows = [{"lora.alpha": None, "lora.rank_pattern": {"to_k": 2}}, {"lora.alpha": 8, "lora.rank_pattern": {"to_k": 2}}]
    null, number = sweep.plan(tree(rows=rows))
    assert null.value("lora.alpha_pattern") == {"to_k": 2} and number.value("lora.alpha_pattern") == {}
    assert "lora.alpha=null" in sweep.cli_overrides(null, ["lora"]) and "lora.alpha=8.0" in sweep.cli_overrides(
        number, ["lora"]
    )
    assert len(sweep.plan(tree(rows=rows, exclude=[{"lora.alpha": None}]))) == 1


def test_names_contain_the_settings_that_differ() -> None:
    """What all runs have in common is a digest, or nothing where params.yaml has it too; alone it is spelled out."""
    common = {"train.num_steps": [40], "train.batch_size": [4], "validate.prompts": [["a fox in snow"]]}
    (first, second) = names(grid={"lora.rank": [4, 16]} | common)
    mark = re.fullmatch(r"raw/rank-4,with-([0-9a-f]{6})-s0", first)
    assert mark and second == f"raw/rank-16,with-{mark[1]}-s0"
    assert stage_folders("train", grid={"lora.rank": [4, 16]} | common)[0] != first  # of fewer sections
    (other, _) = names(grid={"lora.rank": [4, 16]} | common | {"train.num_steps": [50]})
    assert other != first and other.startswith("raw/rank-4,with-")
    own = read_yaml(REPOSITORY / "params.yaml")["train"]["batch_size"]
    assert names(grid={"lora.rank": [4, 16], "train.batch_size": [own]}) == ["raw/rank-4-s0", "raw/rank-16-s0"]
    assert names(grid={"lora.rank": [4, 16], "train.num_steps": [40]})[0] == "raw/rank-4,num_steps-40-s0"
    assert "num_steps-40" in names(grid=common)[0] and "a_fox_in_snow" in names(grid=common)[0]


def test_names_do_not_change_when_the_sweep_grows() -> None:
    few = names(rows=[{"lora.rank": 4}])
    assert few[0] in names(rows=[{"train.num_steps": 90}, {"lora.rank": 4}], seeds=[3, 0])


def test_names_are_safe_and_differ_for_different_values() -> None:
    values = [["to_q"], ["to_q", "to_k"], "to_q", "To_q", "to_q ", "attention", r".*\.to_[qk]$", "x" * 300, ["x" * 300]]
    found = names(grid={"lora.target_modules": values})
    assert len({name.casefold() for name in found}) == len(values)
    for name in found:
        dataset, _, folder = name.partition("/")
        assert re.fullmatch(r"[a-z0-9][a-z0-9._,+-]*-s0", folder) and len(folder) < 200, folder
    assert "raw/target_modules-attention-s0" in found
    same = hashlib.sha256(json.dumps(["to_q"]).encode()).hexdigest()[:6]  # stable: of the value alone
    assert found[0] == f"raw/target_modules-to_q-{same}-s0"


def test_a_source_outside_of_data_has_a_folder_of_its_own() -> None:
    sources = ["data/raw", "raw", "data/Raw", "Raw"]
    found = names(datasets=sources)
    assert found[0] == "raw/default-s0" and len({name.casefold() for name in found}) == len(sources)


def test_a_folder_under_two_spellings_is_one() -> None:
    """Else its adapters are trained twice, and stand beside themselves on the leaderboard."""
    assert names(datasets=["data/raw", "data/raw/", "./data//raw"]) == ["raw/default-s0"]
    assert len(stage_folders("train", grid={"model.pretrained": ["data/base", "data/base/"]})) == 1
    two = {"datasets": ["data/raw", "data/other/"]}
    assert names(**two, exclude=[{"dataset.source": "data/raw/"}]) == ["other/default-s0"]


def test_two_settings_in_one_folder_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "digest", lambda value: "0")
    found = problems(grid={"lora.target_modules": [["to_q"], ["to_Q"]]})
    assert found[-1].startswith("params.yaml sweep: runs/raw/target_modules-to_q-0-s0 (report): ")
    assert found[-1].code == "folder-name-clash"


def test_names_have_the_section_of_keys_that_several_sections_have() -> None:
    assert names(rows=[{"train.batch_size": 4}, {"validate.batch_size": 4}]) == [
        "raw/train.batch_size-4-s0",
        "raw/validate.batch_size-4-s0",
    ]


def test_a_dataset_may_bring_settings_of_its_own() -> None:
    sources = ["data/raw", {"dataset.source": "data/rex", "dataset.instance_prompt": "a photo of sks dog"}]
    runs = sweep.plan(tree(datasets=sources, grid={"lora.rank": [4, 16]}))
    assert [run.value("dataset.instance_prompt") for run in runs] == [None, None, *["a photo of sks dog"] * 2]
    assert len({run.stage_folders["cache_latents"] for run in runs}) == 2


def test_every_problem_is_reported_at_once() -> None:
    found = problems(
        datasets=[{"dataset.flip": True}],
        grid={"lora.rnak": [4], "train.seed": [1], "runtime.device": ["cpu"], "rank": [4], "dataset.flip": [True]},
        rows=[{"dataset.source": "data/raw"}],
        exclude=[{"lora.rakn": 4}],
    )
    wanted = [
        'sweep.datasets: {"dataset.flip": true} has no source',
        "sweep.grid lora.rnak: unknown setting. Did you mean lora.rank",
        "sweep.grid train.seed: list its values in sweep.seeds",
        "sweep.grid runtime.device: SECTION.KEY",
        "sweep.grid rank: SECTION.KEY is expected, such as lora.rank",
        "sweep.grid dataset.flip: sweep.datasets sets this key too",
        "sweep.rows dataset.source: list its values in sweep.datasets",
        "sweep.exclude lora.rakn: unknown setting",
    ]
    assert len(found) == len(wanted)
    for line, start in zip(found, wanted, strict=True):
        assert line.startswith("params.yaml " + start), line


def test_every_value_is_validated_once_by_its_section() -> None:
    found = problems(grid={"lora.rank": [0, "x", 4], "train.learning_rate": [-1.0, 1e-3]}, seeds=[0, 1])
    assert found == [
        "params.yaml sweep: lora.rank: got 0, but a value greater than or equal to 1 is expected.",
        f"params.yaml sweep: train.learning_rate: got -1.0, {found[1].partition(', ')[2]}",
        "params.yaml sweep: lora.rank: got 'x', but a valid integer is expected.",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"lora.rank": []}}, r"sweep\.grid\.lora\.rank: got \[\], but at least 1 item is expected"),
        ({"seeds": ["a"]}, r"sweep\.seeds\.0: got 'a', but a valid integer"),
        ({"seed": [1]}, r"sweep\.seed: unknown setting. Did you mean sweep\.seeds"),
        ({"exclude": [{"lora.rank": 9}]}, r"exclude: \{\"lora.rank\": 9\} matches no run"),
        ({"exclude": [{"lora.rank": 8}]}, r"exclude: all runs"),
        ({"grid": {"lora.rank": list(range(1, 200)), "lora.alpha": list(range(1, 200))}}, r"got 39,601 runs.* 10,000"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    (line,) = problems(**changes)
    assert re.search(message, line), line


def test_settings_that_do_not_go_together_are_named_with_their_run() -> None:
    runs = sweep.plan(tree(grid={"lora.rank": [4, 8]}, rows=[{"export.resized_ranks": [16]}]))
    (line,) = sweep_problems(runs)
    assert "export.resized_ranks: 16 is not below the adapter's rank 8" in line
    assert re.search(r"\(sweep: raw/resized_ranks-\S+-s0\)$", line)


def test_check_reports_the_problems_of_the_sweep(workspace: Any) -> None:
    done = workspace.process("check", "--set", "sweep.grid={lora.rank: [2, 0]}")
    assert done.returncode == 2
    assert_line(done.stderr, "wrong-value", "--set sweep: lora.rank", "got 0", "1")


@pytest.mark.parametrize("sha256", [None, "0" * 64])
def test_a_missing_feature_model_is_refused_before_the_first_job(sha256: str | None) -> None:
    missing = {"path": "data/nothere", "sha256": sha256}
    (problem,) = sweep_problems(sweep.plan(tree(rows=[{"validate.feature_model": missing}, {}])))
    assert problem.startswith("params.yaml sweep: validate.feature_model: 'data/nothere' ")
    assert "(sweep: raw/feature_model-" in problem


def test_a_feature_model_without_a_digest_is_refused_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(feature_files, "folder_problems", lambda folder: [])
    write_json(tmp_path / "clip/config.json", {"model_type": "clip"})
    (problem,) = sweep_problems(sweep.plan(tree(rows=[{"validate.feature_model": {"path": f"{tmp_path}/clip"}}])))
    assert "sha256: " in problem


def test_command_line_replaces_keys_and_reads_them_as_set_does() -> None:
    """Snakemake's --config gives every scalar as text."""
    given = {"grid": {"train.learning_rate": ["1e-4"], "lora.use_rslora": ["true"]}, "seeds": ["0", "1"]}
    runs = sweep.plan(sweep.from_command_line(tree(seeds=[5]), given))
    assert [run.name for run in runs] == [f"raw/use_rslora-true,learning_rate-0.0001-s{n}" for n in (0, 1)]
    with pytest.raises(UserError, match=r"--config ranks: unknown setting. Known settings: datasets, grid"):
        sweep.from_command_line(tree(), {"ranks": "4,8"})


TEXT_VALUES = ["a photo of ", "null", "3", "a fox: night", "yes", "1e-4", " #x", "[a]", "é 雪 🦊", "", "it's"]


@pytest.mark.parametrize(
    ("key", "given", "wanted"),
    [
        ("dataset.caption_prefix", TEXT_VALUES, TEXT_VALUES),  # text
        ("dataset.instance_prompt", ["3", "a: b", "null"], ["3", "a: b", None]),  # text or null
        ("validate.prompts", [["3", "a: b"], [" yes", "null"]], [["3", "a: b"], [" yes", "null"]]),  # list of text
        ("lora.target_modules", ["attention", ["to_q", "3"]], ["attention", ["to_q", "3"]]),  # text or list of text
        ("lora.init_from", ["null", {"path": "3", "sha256": "0123"}], [None, {"path": "3", "sha256": "0123"}]),
        ("lora.rank_pattern", [{"to_q": "4"}], [{"to_q": 4}]),
        (
            "dataset.subsets",
            ["null", [{"path": "1", "repeats": "2", "instance_prompt": "3"}]],
            [None, [{"path": "1", "repeats": 2, "instance_prompt": "3"}]],
        ),
        ("lora.bias", ["none"], ["none"]),
        ("train.timestep_shift", ["auto", "1.5"], ["auto", 1.5]),
        ("train.optimizer_args", [{"eps": "1e-8"}], [{"eps": 1e-8}]),
        ("train.early_stop_patience", ["null", "3"], [None, 3]),
    ],
)
def test_a_value_from_the_command_line_has_the_type_of_its_setting(key: str, given: Any, wanted: Any) -> None:
    """Snakemake has taken the quotes away, so the setting says what is text."""
    section = sweep.from_command_line(tree(), {"grid": {key: given}})["sweep"]
    assert section["grid"] == {key: wanted}
    rows = [{"dataset.source": "data/raw", key: value} for value in given]
    for name in ("rows", "datasets", "exclude"):
        section = sweep.from_command_line(tree(), {name: rows})["sweep"]
        assert [row[key] for row in section[name]] == wanted
    assert sweep.from_command_line(tree(), {"datasets": ["3"]})["sweep"]["datasets"] == ["3"]


def test_a_mapping_without_an_entry_is_null_in_names_patterns_and_jobs() -> None:
    grid = {"lora.rank_pattern": [None, {"to_k": 4}]}
    first, second = sweep.plan(tree(grid=grid))
    assert first.name == "raw/rank_pattern-null-s0" and first.value("lora.rank_pattern") == {}
    assert sweep.cli_overrides(first, ["lora"])[1] == "lora.rank_pattern=null"
    for none in (None, {}):
        assert [r.name for r in sweep.plan(tree(grid=grid, exclude=[{"lora.rank_pattern": none}]))] == [second.name]


def test_any_text_survives_the_command_line_of_a_job() -> None:
    texts = [*TEXT_VALUES, "a\x85b\u2028c\x7fd\ufffe", "back\\slash", "\U000e0041"]
    for run, wanted in zip(sweep.plan(tree(grid={"export.prompt": texts})), texts, strict=True):
        (word,) = sweep.cli_overrides(run, ["export.prompt"])[1:]
        assert YAML(typ="safe", pure=True).load(word.partition("=")[2]) == wanted


@pytest.mark.parametrize("section", [None, [], "x", 3])
def test_a_section_of_another_kind_is_one_line_under_config_too(section: object) -> None:
    with pytest.raises(UserError) as error:
        sweep.plan(sweep.from_command_line(tree() | {"sweep": section}, {"seeds": [1]}))
    (line,) = error.value.problems
    assert line.startswith(f"params.yaml sweep: got {as_yaml(section)}, but {{datasets: ..., grid:")


def test_keys_that_are_no_text_are_refused_with_the_others() -> None:
    found = problems(grid={"train.optimizer_args": [{1: 2, "1": 2}], "lora.rank": [{(1,): 2}]})
    assert len(found) == 2 and "lora.rank: got {(1,): 2}" in found[0] and "optimizer_args" in found[1]


def test_the_command_line_of_a_stage_has_its_own_overrides_unchanged() -> None:
    values = {"lora.rank_pattern": {"attn2.to_k": 16}, "lora.init_lora_weights": "kaiming", "train.learning_rate": 1e-5}
    (run,) = sweep.plan(tree(rows=[values | {"validate.prompts": ["a: b, 'c'"], "export.name": "x"}]))
    words = sweep.cli_overrides(run, ["model", "lora", "train"])
    values |= {"train.seed": 0}
    assert words[::2] == ["--set"] * 4 and "lora.init_lora_weights=kaiming" in words
    yaml = YAML(typ="safe", pure=True)
    assert {k: yaml.load(v) for k, _, v in (word.partition("=") for word in words[1::2])} == values
    (_, prompts) = sweep.cli_overrides(run, ["validate"])
    assert yaml.load(prompts.partition("=")[2]) == ["a: b, 'c'"]
    assert sweep.cli_overrides(run, ["export.name"]) == ["--set", "export.name=x"]
    assert sweep.cli_overrides(run, ["export.seed"]) == []


@pytest.mark.parametrize("key", ["validate.feature_model", "lora.init_from"])
def test_a_pinned_file_keeps_its_path(key: str) -> None:
    """Where it lies decides no result, so a section's dump is without it; a job must find it all the same."""
    pinned = {"path": "data/pinned", "sha256": "0" * 64}
    (run,) = sweep.plan(tree(rows=[{key: pinned}, {}], exclude=[{key: None}]))
    (word,) = sweep.cli_overrides(run, [key])[1:]
    assert json.loads(word.partition("=")[2]) == pinned
    assert sweep.plan(tree(rows=[{key: pinned}, {}], exclude=[{key: pinned}]))[0].name == "raw/default-s0"


def test_summary_counts_and_estimates_from_earlier_trainings(tmp_path: Path) -> None:
    asked = tree(grid={"lora.rank": [4, 8], "validate.seed": [0, 1]}, rows=[{"train.num_steps": 100}])
    asked["train"] |= {"num_steps": 400, "batch_size": 16}
    runs = sweep.plan(asked)
    counts, unknown = sweep.summary(runs, [])
    assert counts.startswith("sweep: 5 runs") and "train 3" in counts and "validate 5" in counts
    assert "900 optimizer steps" in unknown and "time unknown" in unknown
    for name, speed in (
        (".", 50.0),
        ("runs/raw/a", 100.0),
        ("runs/raw/b", 1000.0),
        ("runs/raw/c", "none"),
        ("data/x", 1.0),
    ):
        path = tmp_path / name / "reports/train/run.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"images_per_second": speed}))
    measured = sweep.measurements(tmp_path)
    assert measured == [50.0, 100.0, 1000.0]
    # 900 steps of 16 images at the median of 100 a second
    assert "about 2.4 min one after the other at 6.2 steps/s" in sweep.summary(runs, measured)[1]
    write_json(tmp_path / "runs/raw/rank-4-s0/adapter/adapter.json", {})
    line = sweep.summary(runs, measured, tmp_path)[1]
    assert line.startswith("train: 900 optimizer steps")
    assert line.endswith(". 400 of the steps are done")


def test_upstream_sections_equal_those_of_dvc_yaml() -> None:
    """Folders are shared by them: a section too few would let two settings write to one folder."""
    stages = read_yaml(REPOSITORY / "dvc.yaml")["stages"]

    def outs(stage: dict[str, Any]) -> set[str]:
        entries = [e for kind in ("outs", "metrics", "plots") for e in stage.get(kind, [])]
        return {next(iter(e)) if isinstance(e, dict) else e for e in entries}

    def behind(name: str) -> set[str]:
        own = {key.partition(".")[0] for key in stages[name]["params"] if isinstance(key, str)}
        before = [other for other in stages if set(stages[name]["deps"]) & outs(stages[other])]
        return own.union(*map(behind, before))

    for name in stages:
        assert behind(name) <= set(sweep.UPSTREAM_SECTIONS[name]), name
        if name != "validate":  # stands in report's folder
            assert behind(name) == set(sweep.UPSTREAM_SECTIONS[name]), name


def test_a_thousand_runs_are_planned_in_seconds() -> None:
    grid = {"lora.rank": list(range(1, 11)), "train.learning_rate": [i * 1e-4 for i in range(1, 11)]}
    start = time.process_time()
    runs = sweep.plan(tree(grid=grid, seeds=list(range(10))))
    assert len({run.name for run in runs}) == 1000
    assert sweep_problems(runs) == []
    assert time.process_time() - start < 5  # 0.7 s where this was written; a YAML file read per run took 100 s


def test_snakemake_names_params_yaml_and_not_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("lora: [\n")
    with refused("invalid-yaml", "params.yaml:"):
        save_params({})
    assert not Path("runs").exists()
