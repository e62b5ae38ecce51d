"""End to end on the tiny random base: equal bytes, paired rows, an exact zero for no training, and user errors."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from lora_dag.artifacts import metrics
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.artifacts.lineage import load as load_lineage
from lora_dag.artifacts.lineage import parse as parse_lineage
from lora_dag.core import params, seeding
from lora_dag.core.console import UserError
from lora_dag.core.files import read_json
from lora_dag.core.params import ModelParams
from lora_dag.evaluation import heldout_table
from lora_dag.families import common, sd
from stages.validate import score_snapshots
from tests.helpers.caches import write_mixed_cache
from tests.helpers.errors import assert_line, refused
from tests.helpers.validated import reports, write_adapter
from tests.helpers.workspace import Workspace, read_rows, write_rows

SAMPLES = ("chroma", "dark_share", "copied_share", "far_share", "blank_share", "nearest_distance", "diversity")
KEYS = {
    *(f"val.{name}" for name in ("best_step", "onset_step", "loss", "loss_base", "table")),
    *(f"val.{name}" for name in ("train_loss", "train_loss_base")),
    *(
        f"val.{name}{end}"
        for name in ("loss_change", "overfit_gap", "final_minus_best")
        for end in ("", "_low", "_high")
    ),
    *(f"drift.loss{end}" for end in ("", "_base", "_change", "_change_low", "_change_high")),
    "cost.tflop_per_image",
    *(f"val.loss_{band}_noise{suffix}" for band in ("low", "mid", "high") for suffix in ("", "_base")),
    *(f"samples.{name}{suffix}" for name in SAMPLES for suffix in ("", "_base")),
}


@pytest.fixture
def mixed(workspace: Workspace) -> Workspace:
    """A workspace with latents of three shapes, some with masks, and an adapter."""
    write_mixed_cache()
    write_adapter(0.3)
    return workspace


def heldout(workspace: Workspace) -> list[heldout_table.Score]:
    return heldout_table.scores_from_csv((workspace.path / "reports/validate/heldout.csv").read_text())


def test_two_runs_write_the_same_bytes(cached: Workspace) -> None:
    write_adapter(0.3)
    lines = cached.run("validate", "--set", "validate.scales=[0.5, 1]")
    assert any(line.startswith("change") and "95% interval" in line for line in lines)
    first = reports(cached)
    shutil.rmtree(".state/evidence")
    cached.run("validate", "--set", "validate.scales=[0.5, 1]")
    assert reports(cached) == first

    measured = metrics.load(Path("reports/metrics.json"))
    assert set(measured) == KEYS
    assert isinstance(measured["val.loss_change"], float) and measured["val.loss_change"] != 0
    curve = first["validate/curve.csv"].decode().splitlines()
    assert [line.partition(",")[0] for line in curve] == ["step", "0", "2", "4"]
    assert parse_lineage(first["validate/lineage.json"])["model"]["pretrained"] == "base"
    assert parse_lineage(first["validate/lineage.json"])["validate"]["feature_model"] is None
    assert parse_lineage(first["validate/lineage.json"])["sheet"] == {"cell": 128, "image": [32, 32]}
    assert not any(str(cached.path).encode() in blob for blob in first.values())
    sizes = [Image.open(io.BytesIO(first[name])).width for name in ("samples.png", "progress.png")]
    assert sizes[0] == sizes[1] and all(len(first[f"{name}.png"]) <= 300_000 for name in ("samples", "progress"))


def test_an_untrained_adapter_changes_nothing_at_all(cached: Workspace) -> None:
    write_adapter(0)
    cached.run("validate", "--set", "model.dtype=bfloat16")
    assert all(score.base == score.adapter for score in heldout(cached))
    measured = metrics.load(Path("reports/metrics.json"))
    assert [measured[f"val.loss_change{bound}"] for bound in ("", "_low", "_high")] == [0, 0, 0]
    assert measured["val.best_step"] == 0
    for name in SAMPLES:
        assert measured[f"samples.{name}"] == measured[f"samples.{name}_base"]
    assert [measured[f"drift.loss_change{bound}"] for bound in ("", "_low", "_high")] == [0, 0, 0]
    assert measured["val.onset_step"] is None


def test_losses_equal_an_independent_computation(cached: Workspace) -> None:
    write_adapter(0.3)
    cached.run("validate", "--set", "validate.batch_size=3")
    model = params.load(Path("params.yaml")).section(ModelParams)
    cache, scheduler = LatentCache(Path("data/latents")), sd.load_scheduler(model)
    denoiser = sd.load_denoiser(model, torch.device("cpu"))
    items = {item.file_name: item for item in cache.items}
    alpha_bar = scheduler.alphas_cumprod
    for index, score in enumerate(heldout(cached)):
        item, t = items[score.file_name], score.timestep
        latents = cache.latents(item.views[0])[0]
        noise = torch.randn(latents.shape, generator=seeding.generator(0, "validate-noise", item.content, index % 2))
        a, b = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        prompt = {name: value[None] for name, value in cache.prompt(item.caption).items()}
        with torch.no_grad():
            model_pred = sd.predict(denoiser, (a * latents + b * noise)[None], torch.tensor([t]), prompt)[0]
        loss = ((model_pred - (a * noise - b * latents)) ** 2).mean().item()  # v, Salimans & Ho 2022, appendix D
        assert score.base == pytest.approx(loss, rel=1e-4)
        assert item.split == score.split
        assert abs(score.adapter - score.base) > 1e-5


def test_rows_do_not_depend_on_batch_size_or_number_of_images(cached: Workspace) -> None:
    write_adapter(0.3)
    cached.run("validate", "--set", "validate.max_images=1")
    few = {(s.file_name, s.timestep): s for s in heldout(cached)}
    assert metrics.load(Path("reports/metrics.json"))["val.loss_change_low"] is None
    cached.run("validate", "--set", "validate.max_images=2", "--set", "validate.ink_measures=false")
    many = {(s.file_name, s.timestep): s for s in heldout(cached)}
    assert few.items() < many.items()
    assert "samples.chroma" not in metrics.load(Path("reports/metrics.json"))


def test_table_digest_does_not_depend_on_dtype_and_batch_size(cached: Workspace) -> None:
    write_adapter(0.3)
    cached.run("validate")
    table, asked = metrics.load(Path("reports/metrics.json"))["val.table"], heldout(cached)
    keys = {item.views for item in LatentCache(Path("data/latents")).items}
    for change in ("model.dtype=bfloat16", "cache.batch_size=3"):
        cached.run("cache_latents", "--set", change)
        assert keys.isdisjoint(item.views for item in LatentCache(Path("data/latents")).items)
        cached.run("validate", "--set", change)
        assert metrics.load(Path("reports/metrics.json"))["val.table"] == table
        assert [(s.file_name, s.timestep) for s in heldout(cached)] == [(s.file_name, s.timestep) for s in asked]
        assert [s.base for s in heldout(cached)] == pytest.approx([s.base for s in asked], rel=0.05)


def test_table_digest_depends_on_the_vae(cached: Workspace) -> None:
    write_adapter(0.3)
    cached.run("validate")
    table = metrics.load(Path("reports/metrics.json"))["val.table"]
    base = Path("data/base").resolve()
    Path("data/base").unlink()
    shutil.copytree(base, "data/base")
    path = Path("data/base/vae/config.json")
    path.write_text(json.dumps(read_json(path) | {"scaling_factor": 0.4}))
    cached.run("cache_latents")
    write_adapter(0.3)
    cached.run("validate")
    assert metrics.load(Path("reports/metrics.json"))["val.table"] != table


def test_content_digest_depends_on_images_and_captions_only(cached: Workspace) -> None:
    def content(*argv: str) -> str:
        for stage in ("prepare", "cache_latents", "validate"):
            cached.run(stage, *argv)
        return load_lineage(Path("reports/validate/lineage.json"))["dataset"]["content"]

    write_adapter(0.3)
    first = content()
    assert content("--set", "model.dtype=bfloat16") == first
    rows = read_rows(Path("data/raw"))
    rows[2]["text"] = "another"
    write_rows(Path("data/raw"), rows)
    assert content() != first


def test_identical_images_are_both_in_the_table(workspace: Workspace) -> None:
    rows = read_rows(Path("data/raw"))
    for index in range(8):
        shutil.copy(f"data/raw/{index:02}.png", f"data/raw/twin-{index:02}.png")
    write_rows(Path("data/raw"), rows + [{"file_name": f"twin-{row['file_name']}", "text": "x"} for row in rows])
    workspace.run("prepare")
    workspace.run("cache_latents")
    write_adapter(0.3)
    workspace.run("validate")
    scores = {name: list(group) for name, group in itertools.groupby(heldout(workspace), lambda s: s.file_name)}
    twins = [name for name in scores if f"twin-{name}" in scores]
    assert twins and all(len(group) == 2 for group in scores.values())
    for name in twins:
        one, other = scores[name], scores[f"twin-{name}"]
        assert [s.timestep for s in one] == [s.timestep for s in other]
        assert [s.base for s in one] != [s.base for s in other]  # the captions differ


# Several shapes, masks, regularization


def test_mixed_images_are_validated(mixed: Workspace) -> None:
    mixed.run("validate", "--set", "validate.max_images=64")
    first = reports(mixed)
    shutil.rmtree(".state/evidence")
    mixed.run("validate", "--set", "validate.max_images=64")
    assert reports(mixed) == first
    assert set(metrics.load(Path("reports/metrics.json"))) == KEYS
    lineage = parse_lineage(first["validate/lineage.json"])
    assert lineage["sheet"] == {"cell": 96, "image": [48, 16]}  # most of the table's images are wide
    assert lineage["table"]["num_images"] == {"heldout": 5, "train": 5}
    assert all(len(first[f"{name}.png"]) <= 300_000 for name in ("samples", "progress"))


def test_regularization_images_are_not_scored(mixed: Workspace) -> None:
    mixed.run("validate", "--set", "validate.max_images=64")
    regularization = {item.file_name for item in LatentCache(Path("data/latents")).items if item.regularization}
    assert len(regularization) == 2 and regularization.isdisjoint(score.file_name for score in heldout(mixed))
    write_mixed_cache(regularization=True)
    with refused("split-empty", "params.yaml dataset.heldout_fraction", "of 0 images"):
        mixed.run("validate")


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_mixed_losses_equal_an_independent_computation(mixed: Workspace, batch_size: int) -> None:
    """Each row by itself, in the order of the table, with its first mask."""
    mixed.run("validate", "--set", f"validate.batch_size={batch_size}", "--set", "validate.max_images=64")
    model = params.load(Path("params.yaml")).section(ModelParams)
    cache, scheduler = LatentCache(Path("data/latents")), sd.load_scheduler(model)
    denoiser = sd.load_denoiser(model, torch.device("cpu"))
    items = {item.file_name: item for item in cache.items}
    scores = heldout(mixed)
    chosen = list(dict.fromkeys(score.file_name for score in scores))
    assert chosen == sorted(chosen, key=lambda name: (items[name].split != "heldout", items[name].content))
    assert len({cache.latents(items[name].views[0])[0].shape for name in chosen}) == 3
    for index, score in enumerate(scores):
        item, t = items[score.file_name], score.timestep
        latents = cache.latents(item.views[0])[0]
        noise = torch.randn(latents.shape, generator=seeding.generator(0, "validate-noise", item.content, index % 2))
        a, b = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
        prompt = {name: value[None] for name, value in cache.prompt(item.caption).items()}
        with torch.no_grad():
            model_pred = sd.predict(denoiser, (a * latents + b * noise)[None], torch.tensor([t]), prompt)[0]
        errors = ((model_pred - (a * noise - b * latents)) ** 2).double()
        mask = (cache.mask(item.masks[0]) if item.masks else torch.ones(1, *latents.shape[1:])).expand_as(errors)
        assert score.base == pytest.approx(float((errors * mask).sum() / mask.sum()), rel=1e-4)


def test_mask_changes_only_the_rows_of_its_image(mixed: Workspace) -> None:
    def losses() -> dict[tuple[str, int], float]:
        mixed.run("validate", "--set", "validate.max_images=64")
        return {(score.file_name, score.timestep): score.base for score in heldout(mixed)}

    with_masks = losses()
    masked = {item.file_name for item in LatentCache(Path("data/latents")).items if item.masks}
    write_mixed_cache(masked=False)
    without = losses()
    assert with_masks.keys() == without.keys()
    assert {name for name, _ in with_masks if name in masked}
    for (name, timestep), loss in with_masks.items():
        assert (loss != without[name, timestep]) == (name in masked)


def test_losses_of_a_size_do_not_depend_on_other_sizes(mixed: Workspace) -> None:
    argv = ("--set", "validate.max_images=64", "--set", "validate.batch_size=4")
    mixed.run("validate", *argv)
    among = {(s.file_name, s.timestep): (s.base, s.adapter) for s in heldout(mixed)}
    manifest = read_json(Path("data/latents/manifest.json"))
    wide = {"00.png", "01.png", "02.png", "03.png", "10.png"}
    manifest["items"] = [item for item in manifest["items"] if item["file_name"] in wide]
    Path("data/latents/manifest.json").write_text(json.dumps(manifest))
    mixed.run("validate", *argv)
    alone = {(s.file_name, s.timestep): (s.base, s.adapter) for s in heldout(mixed)}
    assert len(alone) == 10 and alone.items() <= among.items()


@pytest.mark.parametrize(
    ("step", "state", "remedy"),
    [
        (0, "the base", "fetch the base model again"),
        (2, "the snapshot of step 2", "lower train.learning_rate"),
        (4, "the final adapter", "lower train.learning_rate"),
    ],
)
def test_losses_that_are_not_finite(
    cached: Workspace, monkeypatch: pytest.MonkeyPatch, step: int, state: str, remedy: str
) -> None:
    write_adapter(0.3)
    answers = ([float("nan") if state == step else 0.1] * 8 for state in (0, 2, 4))
    monkeypatch.setattr(score_snapshots, "row_losses", lambda *_: next(answers))
    with refused("loss-not-finite", "8 of 8", state, "bfloat16", "model.dtype to float32", remedy):
        cached.run("validate", "--set", "model.dtype=bfloat16", "--set", "validate.drift_prompts=[]")
    assert not Path("reports/metrics.json").exists()


def test_images_of_a_prompt_do_not_depend_on_the_others(cached: Workspace) -> None:
    from lora_dag.pages.sheets import cut

    write_adapter(0.3)
    cells = []
    for prompts in ("[red apple, blue boat]", "[blue boat]"):
        cached.run("validate", "--set", f"validate.prompts={prompts}")
        count = len(load_lineage(Path("reports/validate/lineage.json"))["validate"]["prompts"])
        with Image.open("reports/samples.png") as image:
            cells.append(cut(image.convert("RGB"), count, 2, 128)[-1])
    difference = [
        abs(x - y) for a, b in zip(*cells, strict=True) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)
    ]
    assert max(difference) <= 2


def test_another_base_is_refused(cached: Workspace) -> None:
    write_adapter(0)
    record = read_json(Path("data/adapter/adapter.json"))
    record["base"]["unet"] = "0" * 64
    Path("data/adapter/adapter.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"data/adapter.*unet"):
        cached.run("validate")
    assert not Path("reports/metrics.json").exists()


@pytest.mark.parametrize(
    ("override", "code", "values"),
    [
        ("prompts=[]", "wrong-value", ("[]",)),
        ("prompts=[a, a]", "value-twice", ("'a'",)),
        ("prompts=['a  fox', ' a fox ']", "value-twice", ("'a fox'",)),
        ("prompts=[a, ' ']", "empty-prompt", ()),
        ("drift_prompts=[a, a]", "value-twice", ("'a'",)),
        ("drift_prompts=['']", "empty-prompt", ()),
        ("num_seeds=0", "wrong-value", ("0",)),
        ("max_copied_share=1.5", "wrong-value", ("1.5",)),
        ("scales=[1, 1.0]", "value-twice", ("1.0",)),
        ("num_timesteps=0", "wrong-value", ("0",)),
        ("num_timestep=8", "unknown-setting", ("num_timesteps",)),
        ("guidance_scale=.nan", "wrong-value", ("nan",)),
        ("negative_prompt=blur", "setting-ignored", ("guidance_scale 1.0", "above 1")),
    ],
)
def test_wrong_settings_are_refused(workspace: Workspace, override: str, code: str, values: tuple[str, ...]) -> None:
    arguments = ["--set", f"validate.{override}"]
    if code == "setting-ignored":
        arguments += ["--set", "validate.guidance_scale=1"]
    with refused(code, f"--set validate.{override.partition('=')[0]}", *values):
        workspace.run("validate", *arguments)


def test_missing_adapter_and_missing_latents(cached: Workspace) -> None:
    with pytest.raises(UserError, match=r"adapter\.json.*python -m stages\.train"):
        cached.run("validate")
    with pytest.raises(UserError, match=r"manifest\.json.*python -m stages\.cache_latents"):
        cached.run("validate", "--latents", "elsewhere")


def test_empty_held_out_set_is_refused(cached: Workspace) -> None:
    write_adapter(0)
    manifest = read_json(Path("data/latents/manifest.json"))
    for item in manifest["items"]:
        item["split"] = "train"
    Path("data/latents/manifest.json").write_text(json.dumps(manifest))
    with refused("split-empty", "params.yaml dataset.heldout_fraction", "of 8 images, 0 are held out"):
        cached.run("validate")


def test_long_captions_and_prompts_are_named_once(workspace: Workspace) -> None:
    """Replaces the warnings of transformers (indexing errors) and diffusers (cut prompts of each snapshot)."""
    long, prompts = "many words " * 20, ["снег, café 雪", "many words " * 30]
    rows = read_rows(Path("data/raw"))
    rows[1]["text"] = long
    write_rows(Path("data/raw"), rows)
    asked = ("--set", f"validate.prompts={json.dumps(prompts)}")
    assert workspace.process("prepare").returncode == 0
    encoded = workspace.process("cache_latents")
    assert (encoded.returncode, encoded.stderr) == (0, "")
    assert len(re.findall(r"^warning: 1 caption .* 20 tokens.*\[text-too-long\]$", encoded.stdout, re.MULTILINE)) == 1
    write_adapter(0.3)
    done = workspace.process("validate", *asked)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    (found,) = [index for index, line in enumerate(lines) if line.endswith("[text-too-long]")]
    assert_line(lines[found], "text-too-long", "1 prompt ", "20 tokens")
    assert lines[found + 1].endswith("tokens: " + prompts[1][:79] + "…")
    assert found < next(index for index, line in enumerate(lines) if line.startswith("base "))  # before the work
    assert "truncated" not in done.stdout and "indexing errors" not in done.stdout
    (glyphs,) = [line for line in lines if line.endswith("[glyphs-missing]")]
    assert "雪" in glyphs and "U+96EA" in glyphs


@pytest.mark.parametrize("trains_text", [False, True])
def test_text_encoders_are_freed_and_one_vae_is_loaded(
    cached: Workspace, monkeypatch: pytest.MonkeyPatch, trains_text: bool
) -> None:
    """T5 is half as large as its denoiser. An adapter in the text encoders needs them for each snapshot."""
    write_adapter(0.3)
    if trains_text:
        cached.run("train", "--set", "lora.train_text_encoder=true")
    loaded: dict[str, list[weakref.ref[Any]]] = defaultdict(list)
    load = common.load_pipeline

    def counted(*args: Any, **components: Any) -> Any:
        if loaded:
            assert [ref for ref in loaded["text_encoder"] if ref() is not None] == []
        pipeline = load(*args, **components)
        for name in ("text_encoder", "unet", "vae"):
            if getattr(pipeline, name) is not None:
                loaded[name].append(weakref.ref(getattr(pipeline, name)))
        return pipeline

    monkeypatch.setattr(common, "load_pipeline", counted)
    monkeypatch.setattr(sd, "load_vae", None)
    cached.run("validate")
    assert {name: len(refs) for name, refs in loaded.items()} == {"text_encoder": 1, "unet": 1, "vae": 1}


def test_large_batches_are_decoded_image_by_image(cached: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(0.3)
    sizes: list[int] = []
    decode = AutoencoderKL._decode

    def counted(self: AutoencoderKL, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(z))
        return decode(self, z, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "_decode", counted)
    cached.run("validate")
    assert max(sizes) == 2
    sizes.clear()
    shutil.rmtree(".state/evidence")
    monkeypatch.setattr(score_snapshots, "MAX_DECODED_PIXELS", 32 * 32)
    cached.run("validate")
    assert max(sizes) == 1


def test_one_image_has_no_interval(cached: Workspace) -> None:
    write_adapter(0.3)
    lines = cached.run("validate", "--set", "validate.max_images=1")
    (change,) = [line for line in lines if line.startswith("change ")]
    assert change.endswith(", no interval") and "nan" not in change
