"""`lora-dag check`: every problem, found before anything slow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from lora_dag.commands import check, check_machine
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import read_json
from lora_dag.core.params import FAMILIES, read_with_overrides
from lora_dag.pipeline import sharing
from tests.helpers.errors import assert_are, assert_is, assert_line, refused
from tests.helpers.workspace import Workspace, read_rows, write_rows


@pytest.fixture
def copied(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace with a copy of the base, without checks of the installed packages."""
    monkeypatch.setattr(check, "package_problems", list)
    source = Path("data/base").resolve()
    Path("data/base").unlink()
    shutil.copytree(source, "data/base")
    return workspace


def problems(workspace: Workspace, *changes: str) -> tuple[Problem, ...]:
    with pytest.raises(UserError) as caught:
        workspace.run("check", *(word for change in changes for word in ("--set", change)))
    return caught.value.problems


def problem(workspace: Workspace, *changes: str) -> Problem:
    (found,) = problems(workspace, *changes)
    return found


# The whole command


def test_all_is_well(workspace: Workspace) -> None:
    done = workspace.process("check")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    (note,) = [line for line in lines if line.startswith("note: data")]
    assert note.startswith("note: data/raw: ") and "2 images" in note and "of 8" in note
    lines = [line for line in lines if not line.startswith(("note: ", "warning: "))]
    assert lines.pop(3) == "images      8 opened"
    names = ["parameters", "base", "dataset", "packages", "disk", "device", "objective", "captions", "adapter"]
    names += ["memory", "train:", "arithmetic", "cache"]
    assert [line.split()[0] for line in lines] == names
    assert lines[6] == "objective   v_prediction"
    assert "torch 2.13" in lines[3] and lines[5] == "device      cpu, 1 thread, float32"


def test_the_time_of_the_training_by_the_last_one(workspace: Workspace) -> None:
    for stage in ("prepare", "cache_latents", "train"):
        workspace.run(stage)
    assert not any(line.startswith("time ") for line in workspace.run("check"))
    (record,) = Path(".state/took").glob("train-*.json")
    content = read_json(record)
    record.write_text(json.dumps(content | {"seconds": 7200.0}), encoding="utf-8")
    assert "time        about 2.0 h for 4 steps of training, by the last run here" in workspace.run("check")


def test_a_training_without_snapshots_is_noted(workspace: Workspace) -> None:
    """Also for a run of a sweep."""
    lines = workspace.run("check", "--set", "train.snapshot_every_n_steps=5")
    (note,) = [line for line in lines if line.startswith("note: --set")]
    assert note.startswith("note: --set train.snapshot_every_n_steps: got 5 for 4 steps")
    lines = workspace.run("check", "--set", "sweep.grid={train.snapshot_every_n_steps: [4, 9]}")
    (note,) = [line for line in lines if "snapshot" in line]
    assert "train.snapshot_every_n_steps: got 9 for 4 steps" in note


def test_unshared_data_is_noted(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "unshared_data", lambda sources: ["data/mine.dvc: nobody else can get this data"])
    assert "note: data/mine.dvc: nobody else can get this data" in workspace.run("check")


def test_several_machines_are_noted(workspace: Workspace) -> None:
    asked = ("runtime.num_machines=2", "runtime.num_processes=2", "train.gradient_accumulation_steps=2")
    lines = workspace.run("check", *(word for change in asked for word in ("--set", change)))
    assert any("runtime.num_machines: got 2" in line and "`snakemake --workflow-profile" in line for line in lines)


def test_problems_are_lines_and_exit_code_2(workspace: Workspace) -> None:
    changes = ("model.pretrained=data/none", "dataset.source=data/nothing")
    done = workspace.process("check", *(word for change in changes for word in ("--set", change)))
    assert (done.returncode, done.stdout) == (2, "")
    base, dataset = done.stderr.splitlines()
    assert base.startswith("error: --set model.pretrained: ") and "'data/none'" in base and "`dvc pull" in base
    assert dataset.startswith("error: --set dataset.source: ") and "'data/nothing'" in dataset


PROBE = """
import sys
from lora_dag.core.console import UserError
from tests.helpers import command
try:
    command.run("check", *sys.argv[1:])
except UserError as error:
    print(len(error.problems), *({"torch", "diffusers", "transformers", "peft"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "change", ["lora.rnak=4", "model.pretrained=data/none", "dataset.resolution=36", "dataset.caption_column=caption"]
)
def test_problems_are_found_before_anything_slow_is_imported(workspace: Workspace, change: str) -> None:
    command = [sys.executable, "-c", PROBE, "--set", change]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


# Parameters


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        ("lora.rnak=4", "unknown-setting", ("--set lora.rnak: ", " lora.rank?")),
        ("train.batch_sise=4", "unknown-setting", ("--set train.batch_sise: ", " train.batch_size")),
        ("lora.rank=0", "wrong-value", ("--set lora.rank: got 0", "1")),
        ("lora.rank=eight", "wrong-value", ("--set lora.rank: got 'eight'", "integer")),
        (
            "model.family=sdd",
            "wrong-value",
            ("--set model.family: got 'sdd'", "sd or sd3", repr(FAMILIES[-1])),
        ),
    ],
)
def test_params(copied: Workspace, change: str, code: str, values: tuple[str, ...]) -> None:
    found = problem(copied, change)
    assert found.code == code and all(value in found for value in values), found


def test_params_of_all_sections_at_once(copied: Workspace) -> None:
    found = problems(copied, "lora.rnak=4", "train.lr_warmup_steps=9", "validate.seed=-1")
    assert [line.split(":")[0] for line in found] == [
        "--set lora.rnak",
        "--set train.lr_warmup_steps",
        "--set validate.seed",
    ]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        (("dataset.resolution=36", "dataset.max_upscale=9"), "resolution-not-multiple"),
        (("model.pretrained=other.yaml.safetensors",), "checkpoint-not-in-folder"),
        (("lora.init_from={path: data/nowhere.safetensors}",), "file-missing"),
        (("validate.feature_model={path: data/nowhere}",), "feature-model-missing"),
    ],
)
def test_the_params_file_that_was_read_is_named(copied: Workspace, changes: tuple[str, ...], code: str) -> None:
    tree = read_with_overrides(Path("params.yaml"), changes)
    Path("other.yaml").write_text(json.dumps(tree))
    Path("other.yaml.safetensors").write_bytes(b"")
    with refused(code) as raised:
        copied.run("check", "--params", "other.yaml")
    assert raised.value.problems[0].startswith("other.yaml ")


# The base


def test_formats_that_could_not_hold_the_adapter(copied: Workspace) -> None:
    found = problems(copied, "lora.bias=all")
    assert [line.split(" cannot hold")[0] for line in found] == [
        "params.yaml export.formats: diffusers",
        "params.yaml export.formats: peft",
    ]
    copied.run("check", "--set", "lora.bias=all", "--set", "export.formats=[comfyui, merged]")


def check_base(workspace: Workspace, code: str, *values: str, changes: tuple[str, ...] = ()) -> None:
    with refused(code, *values):
        workspace.run("check", *(word for change in changes for word in ("--set", change)))


def test_a_hub_id_gets_the_command_that_fetches_it(copied: Workspace) -> None:
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    command = f"`hf download {name} --local-dir data/stable-diffusion-v1-5`"
    values = (f"--set model.pretrained: '{name}'", f"`hub: {name}`", "data/stable-diffusion-v1-5.yaml", command)
    check_base(copied, "base-missing", *values, changes=(f"model.pretrained={name}",))


def test_a_folder_that_is_no_pipeline(copied: Workspace) -> None:
    os.remove("data/base/model_index.json")
    check_base(copied, "no-model-index", "params.yaml model.pretrained: 'data/base'", "model_index.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_model_index(copied: Workspace, text: str) -> None:
    Path("data/base/model_index.json").write_text(text)
    check_base(copied, "base-damaged", "data/base/model_index.json: ")


def change_index(**values: object) -> None:
    path = Path("data/base/model_index.json")
    path.write_text(json.dumps(read_json(path) | values))


def test_another_pipeline(copied: Workspace) -> None:
    change_index(_class_name="StableDiffusionXLPipeline")
    values = (
        "'data/base' is a StableDiffusionXLPipeline",
        "'sd' trains StableDiffusionPipeline",
        "model.family: sdxl.",
    )
    check_base(copied, "wrong-family", "params.yaml model.pretrained: ", *values)


def test_a_pipeline_that_no_family_trains(copied: Workspace) -> None:
    change_index(_class_name="KandinskyPipeline")
    check_base(copied, "wrong-family", "KandinskyPipeline", "No family here")


def test_another_component(copied: Workspace) -> None:
    change_index(unet=["diffusers", "UNet3DConditionModel"])
    place = "data/base/model_index.json unet: got UNet3DConditionModel"
    check_base(copied, "wrong-family", place, "'sd'", "UNet2DConditionModel")


def test_all_components_at_once(copied: Workspace) -> None:
    shutil.rmtree("data/base/vae")
    os.remove("data/base/unet/config.json")
    vae, unet = problems(copied)
    assert vae.code == unet.code == "base-incomplete"
    assert vae.startswith("data/base/vae: no such folder") and "AutoencoderKL" in vae
    assert unet.startswith("data/base/unet: no config file")


def test_pickles_only(copied: Workspace) -> None:
    os.rename("data/base/unet/diffusion_pytorch_model.safetensors", "data/base/unet/diffusion_pytorch_model.bin")
    check_base(copied, "pickle-weights", "data/base/unet: ", "diffusion_pytorch_model.bin")


def test_no_weights(copied: Workspace) -> None:
    os.remove("data/base/unet/diffusion_pytorch_model.safetensors")
    check_base(copied, "base-incomplete", "data/base/unet: no .safetensors weights")


def test_code_in_a_component(copied: Workspace) -> None:
    Path("data/base/unet/my_unet.py").write_text("raise SystemExit('ran')")
    check_base(copied, "code-in-base", "data/base/unet/my_unet.py: ")


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_broken_json_in_a_component(copied: Workspace, name: str, text: str) -> None:
    (Path("data/base") / name).write_text(text)
    check_base(copied, "base-damaged", f"data/base/{name}: no JSON object")


@pytest.mark.parametrize("kept", [0, 5, 5000])
def test_truncated_weights(copied: Workspace, kept: int) -> None:
    path = Path("data/base/unet/diffusion_pytorch_model.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    check_base(copied, "base-damaged", f"{path}: truncated")


def test_a_tokenizer_without_its_vocabulary(copied: Workspace) -> None:
    Path("data/base/tokenizer/tokenizer.json").unlink()
    check_base(copied, "base-incomplete", "data/base/tokenizer: no vocab.json with merges.txt")


def test_a_config_without_its_keys(copied: Workspace) -> None:
    Path("data/base/vae/config.json").write_text("{}")
    check_base(copied, "base-incomplete", "data/base: ", "('block_out_channels')")


def test_wrong_variant(copied: Workspace) -> None:
    found = problems(copied, "model.variant=fp16")
    assert [problem.code for problem in found] == ["variant-missing"] * 3
    for component, problem in zip(("vae", "text_encoder", "unet"), found, strict=True):
        assert problem.startswith(f"data/base/{component}: no weights of model.variant 'fp16'")
        name = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        assert f" {name}.safetensors" in problem and problem.endswith("Set model.variant: null.")


@pytest.mark.parametrize(("resolution", "near"), [(36, "32 or 40"), (100, "96 or 104")])
def test_resolution_must_fit_the_base(copied: Workspace, resolution: int, near: str) -> None:
    place = f"--set dataset.resolution: got {resolution}, "
    values = ("data/base needs multiples of 8", f"Write {near}.")
    changes = (f"dataset.resolution={resolution}", "dataset.max_upscale=9")
    check_base(copied, "resolution-not-multiple", place, *values, changes=changes)


def test_resolution_below_the_least(copied: Workspace) -> None:
    for component in ("vae", "unet"):  # four levels each, as in Stable Diffusion 1.5
        path = Path("data/base") / component / "config.json"
        path.write_text(json.dumps(read_json(path) | {"block_out_channels": [32] * 4}))
    place = "params.yaml dataset.resolution: got 32, "
    check_base(copied, "resolution-not-multiple", place, "multiples of 64", "Write 64.")


def test_bucket_sides(copied: Workspace) -> None:
    changes = ("dataset.aspect_buckets=true", "dataset.resolution=64", "dataset.bucket_step=8", "dataset.max_upscale=9")
    path = Path("data/base/unet/config.json")
    path.write_text(json.dumps(read_json(path) | {"block_out_channels": [32] * 3}))
    values = (" 56, 72 pixels", "data/base needs multiples of 16", "Write 16.")
    check_base(copied, "resolution-not-multiple", "--set dataset.bucket_step: ", *values, changes=changes)


def test_hundreds_of_bucket_sides_are_shown_in_part(copied: Workspace) -> None:
    changes = (
        "dataset.aspect_buckets=true",
        "dataset.resolution=2048",
        "dataset.bucket_step=8",
        "dataset.max_upscale=99",
    )
    path = Path("data/base/unet/config.json")
    path.write_text(json.dumps(read_json(path) | {"block_out_channels": [32] * 5}))
    values = (" 1448, 1456, 1464, 1480, 1488 and 154 more pixels", "multiples of 64", "Write 64.")
    check_base(copied, "resolution-not-multiple", "--set dataset.bucket_step: ", *values, changes=changes)


# The dataset


def test_images_without_captions(copied: Workspace) -> None:
    os.remove("data/raw/metadata.jsonl")
    assert_is(problem(copied), "captions-missing", "data/raw: ")


def test_bad_rows_that_are_left_out_are_reported(copied: Workspace) -> None:
    rows = read_rows(Path("data/raw"))
    rows[2]["text"] = None
    write_rows(Path("data/raw"), rows)
    *_, last = problems(copied, "dataset.on_bad=skip")
    assert_is(last, "too-many-bad", "params.yaml dataset.max_bad_fraction: 1 of 8 images is ")
    lines = copied.run("check", "--set", "dataset.on_bad=skip", "--set", "dataset.max_bad_fraction=0.2")
    assert_line("\n".join(lines), "image-left-out", "data/raw/metadata.jsonl:3: text: ")


def test_batch_of_more_images_than_there_are(copied: Workspace) -> None:
    """The suggested size counts training images alone, so that train accepts it."""
    assert_is(problem(copied, "train.batch_size=8"), "batch-too-large", "--set train.batch_size: got 8, ", "=6 ")
    copied.run("check", "--set", "train.batch_size=6")


def test_mirrors_without_a_second_view(copied: Workspace) -> None:
    check_base(copied, "setting-ignored", "params.yaml cache.num_variants: got 1", changes=("dataset.flip=true",))


def test_metadata_that_is_empty(copied: Workspace) -> None:
    Path("data/raw/metadata.jsonl").write_text("")
    assert_is(problem(copied), "dataset-empty", "data/raw/metadata.jsonl: ")


def test_a_hub_dataset_is_imported_first(copied: Workspace) -> None:
    found = problem(copied, "dataset.source=acme/icons")
    fix = "`lora-dag import acme/icons data/mine`, then set dataset.source=data/mine"
    assert_is(found, "source-missing", "--set dataset.source: 'acme/icons'", fix)


def test_every_bad_row_is_named(copied: Workspace) -> None:
    rows = read_rows(Path("data/raw"))
    rows[2]["text"], rows[5]["file_name"] = None, "gone.png"
    write_rows(Path("data/raw"), rows)
    with Path("data/raw/metadata.jsonl").open("a") as file:
        file.write("file_name,text\n")
    found = problems(copied)
    assert [line.partition(": ")[0] for line in found] == [f"data/raw/metadata.jsonl:{number}" for number in (3, 6, 9)]


def test_wrong_caption_column(copied: Workspace) -> None:
    write_rows(Path("data/raw"), [{**row, "tags": "x"} for row in read_rows(Path("data/raw"))])
    found = problem(copied, "dataset.caption_column=caption")
    place = "--set dataset.caption_column: 'caption'"
    assert_is(found, "column-missing", place, "data/raw/metadata.jsonl", "tags, text")


# Packages, disk, device


def test_packages_of_another_series_and_missing_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_machine, "PACKAGES", {"pydantic": "1", "no-such-package": "2"})
    old, missing = check_machine.package_problems()[:2]
    assert (old.code, missing.code) == ("package-version", "package-missing")
    assert old.startswith("package pydantic: got 2.") and "tested with 1." in old
    assert missing.startswith("package no-such-package: ") and "`pip install -r requirements.lock`" in missing


@pytest.mark.parametrize(
    ("torch", "torchvision", "fits"),
    [
        ("2.13.0+cpu", "0.28.0+cpu", True),
        ("2.13.0+cu130", "0.28.0+cu130", True),
        ("2.13.0", "0.28.0", True),
        ("2.13.0+cpu", "0.28.0+cu130", False),
        ("2.13.0+cu126", "0.28.0+cu130", False),
        ("2.13.0", "0.27.0", False),
        ("2.12.1+cpu", "0.28.0+cpu", False),
        ("", "0.28.0", False),
    ],
)
def test_torchvision_must_belong_to_torch(torch: str, torchvision: str, fits: bool) -> None:
    found = check_machine.torchvision_problems(torch, torchvision)
    assert [each.code for each in found] == ([] if fits else ["torchvision-mismatch"])
    assert all(torchvision in each and torch in each and "`pip uninstall torchvision`" in each for each in found)


@pytest.mark.parametrize("torch", ["2.13.0+cpu", "2.13.0+cu130"])
def test_the_build_of_an_installed_torchvision_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str
) -> None:
    """Metadata of the package index has 0.28.0 for a CUDA build; version.py has the build."""
    for name, version in (("torch", torch), ("torchvision", "0.28.0+cu130")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError")
        (tmp_path / name / "version.py").write_text(f"__version__ = '{version}'\ngit_version = 'abc'\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"] + ["torch"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(check_machine, "PACKAGES", {})
    assert len(check_machine.package_problems()) == (torch == "2.13.0+cpu")


def test_read_only_state_directory(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_machine.os, "access", lambda path, mode: mode != os.W_OK)
    found = problem(copied)
    assert found.code == "state-not-writable"
    assert found.startswith(f"{copied.path / '.state'}: ") and "LORA_STATE_DIR" in found


def test_full_disk(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(check_machine.shutil, "disk_usage", lambda path: usage(10**9, 9 * 10**8, 10**8))
    found = problem(copied)
    assert found.code == "disk-full" and found.startswith(f"{copied.path / '.state'}: got 100 MB")
    assert "524 MB" in found and "LORA_STATE_DIR" in found


def test_float16_needs_a_gpu(copied: Workspace) -> None:
    assert_is(problem(copied, "model.dtype=float16"), "needs-gpu", "--set model.dtype: ", "bfloat16")


def test_fp8_on_a_device_without_float8(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    found = problem(copied, "runtime.device=mps", "model.quantization=fp8")
    assert_is(found, "fp8-on-mps", "model.quantization: ", "int8", "nf4")


def test_a_device_that_is_not_here(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert_is(problem(copied, "runtime.device=mps"), "device-unavailable", "--set runtime.device: 'mps'", "cpu")


def test_check_writes_nothing_but_the_inspection_cache(copied: Workspace) -> None:
    before = set(Path().rglob("*"))
    copied.run("check")
    (written,) = (path for path in set(Path().rglob("*")) - before if path.is_file())
    assert written.match(".state/store/inspected-*.sqlite")


def test_every_image_is_opened(copied: Workspace) -> None:
    (Path("data/raw") / "03.png").write_bytes(b"\x89PNG nothing")
    (Path("data/raw") / "05.png").write_bytes(b"")
    assert_are(
        problems(copied),
        ("image-damaged", "data/raw/metadata.jsonl:4: '03.png'", "PNG"),
        ("image-empty", "data/raw/metadata.jsonl:6: '05.png'"),
    )


def test_images_that_were_not_opened_are_counted(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "OPEN_SECONDS", 0.0)
    (Path("data/raw") / "07.png").write_bytes(b"")
    lines = copied.run("check")
    assert any(line.startswith("images      0 of 8 opened") for line in lines)
    assert any(line.startswith("note: data/raw: about 2 images of 8 will be held out") for line in lines)


def test_a_set_that_cannot_be_split(copied: Workspace) -> None:
    write_rows(Path("data/raw"), read_rows(Path("data/raw"))[:1])
    assert any(problem.code == "split-impossible" for problem in problems(copied))


def test_a_mapping_that_dvc_would_add_to_is_noted(workspace: Workspace) -> None:
    lines = workspace.run("check", "--set", "lora.rank_pattern={to_k: 1}", "--set", "lora.alpha=null")
    (note,) = [line for line in lines if "adds to it" in line]
    assert note.startswith('note: --set lora.rank_pattern: got {"to_k": 1}. `-S` adds to it')
    assert "`-S lora.rank_pattern=null`" in note
    assert not any("adds to it" in line for line in workspace.run("check"))


def test_a_caption_prefix_counts_as_a_word_of_the_captions(workspace: Workspace) -> None:
    asked = ("--set", "validate.prompts=[ohwx on a beach]")
    stranger = "[prompts-unrelated]"
    assert any(stranger in line for line in workspace.run("check", *asked))
    lines = workspace.run("check", *asked, "--set", "dataset.caption_prefix='ohwx, '")
    assert not any(stranger in line for line in lines)


def test_a_base_that_dvc_cannot_find_is_a_warning(workspace: Workspace) -> None:
    base = Path("data/base").resolve()
    (warning,) = [
        line
        for line in workspace.run("check", "--set", f"model.pretrained={base}")
        if line.endswith("[base-path-absolute]")
    ]
    assert_line(warning, "base-path-absolute", "--set model.pretrained: ", f"`ln -s {base} data/base`")
