"""Each family on a tiny random base of its own class: functions against the unchanged pipeline, and the whole DAG."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import diffusers
import numpy as np
import pytest
import torch

from lora_dag.artifacts import packing
from lora_dag.artifacts.latent_cache import LatentCache
from lora_dag.artifacts.manifest import Manifest
from lora_dag.bases import diffusers_folder
from lora_dag.core import params
from lora_dag.core.device import autocast
from lora_dag.core.params import FAMILIES, ModelParams
from lora_dag.core.tensors import load_metadata
from lora_dag.families import common
from lora_dag.families.protocol import Family, all_families, load_family
from lora_dag.images.decode import load_view
from stages.validate.heldout_loss import make_eval_set, row_losses
from stages.validate.params import ValidateParams
from tests.helpers.every_family import overrides, stock_loss
from tests.helpers.families import Stock, case, stock_of
from tests.helpers.workspace import Workspace

CPU = torch.device("cpu")
CAPTIONS = ["red apple", "blue boat", ""]


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stock(name: str) -> Stock:
    return stock_of(name)


@pytest.fixture
def family(name: str) -> Family:
    return load_family(name)


@pytest.fixture
def model(name: str, bases: dict[str, Path]) -> ModelParams:
    return ModelParams(family=name, pretrained=str(bases[name]), variant=None, dtype="float32", quantization=None)


@pytest.fixture
def pipe(stock: Stock, model: ModelParams) -> Any:
    """Return the pipeline, loaded by diffusers alone."""
    pipeline = getattr(diffusers, stock.cls).from_pretrained(model.pretrained)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def trained(workspace: Workspace, name: str, bases: dict[str, Path]) -> Workspace:
    """Return a workspace with this family's base, trained for three steps."""
    Path("data/base").unlink()
    Path("data/base").symlink_to(bases[name])
    return workspace


def test_a_family_is_a_file_and_params_take_its_name(family: Family, name: str, stock: Stock) -> None:
    assert name in get_args(ModelParams.model_fields["family"].annotation) == FAMILIES
    assert stock.cls == family.PIPELINE


def test_families_with_the_same_denoiser_have_equal_layer_tables() -> None:
    """``family_of`` may return either of them, but a stage depends on the file of only one."""
    by_class: dict[str, list[Family]] = {}
    for each in all_families().values():
        by_class.setdefault(each.COMPONENTS[each.DENOISER], []).append(each)
    assert {len(shared) for shared in by_class.values()} >= {1, 2}
    for first, *others in by_class.values():
        assert all(each.ORIGINAL_LAYERS is first.ORIGINAL_LAYERS for each in others)
        assert all(each.PRESET_LAYERS is first.PRESET_LAYERS for each in others)


def test_the_base_is_accepted_and_another_family_is_sent_here(name: str, family: Family, model: ModelParams) -> None:
    assert diffusers_folder.folder_problems(model, family) == []
    for other in set(FAMILIES) - {name}:
        found = diffusers_folder.folder_problems(model.model_copy(update={"family": other}), load_family(other))
        assert len(found) == 1 and found[0].code == "wrong-family" and f"model.family: {name}." in found[0]


def test_tokenizers_may_be_listed_by_their_older_names(
    name: str, family: Family, model: ModelParams, tmp_path: Path
) -> None:
    """SDXL, SD3 and FLUX.1 on the Hub have these names; transformers 5 has one class under both."""
    base = tmp_path / "base"
    shutil.copytree(model.pretrained, base)
    index = (base / "model_index.json").read_text()
    (base / "model_index.json").write_text(index.replace('Tokenizer"', 'TokenizerFast"'))
    assert diffusers_folder.folder_problems(model.model_copy(update={"pretrained": str(base)}), family) == []


def test_comfyui_prefixes_cover_all_adaptable_components(family: Family) -> None:
    """A file has one naming scheme: kohya's or diffusers'."""
    assert set(family.COMFYUI) == {family.DENOISER, *family.TEXT_ENCODERS}
    assert {prefix[-1] for prefix in family.COMFYUI.values()} in ({"_"}, {"."})


def test_components_equal_those_of_the_index(family: Family, model: ModelParams) -> None:
    index = json.loads((Path(model.pretrained) / "model_index.json").read_text())
    listed = {part for part, entry in index.items() if isinstance(entry, list) and entry[0]}
    assert listed == set(family.COMPONENTS)
    assert {*family.VAE, *family.TEXT, family.DENOISER, "scheduler"} == set(family.COMPONENTS)


@torch.no_grad()
def test_prompts_equal_those_of_the_pipeline(family: Family, model: ModelParams, stock: Stock, pipe: Any) -> None:
    found = family.encode_prompts(family.load_text(model, CPU), CAPTIONS)
    expected = stock.encode(pipe, CAPTIONS)
    assert found.keys() == expected.keys()
    for part, tensor in found.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[part]), part
    assert not torch.equal(found["prompt_embeds"][0], found["prompt_embeds"][1])


@torch.no_grad()
def test_embeddings_on_the_disk_have_the_encoders_dtype(family: Family, model: ModelParams) -> None:
    half = model.model_copy(update={"dtype": "bfloat16"})
    text = family.load_text(half, CPU)
    with autocast(CPU, half):
        encoded = family.encode_prompts(text, CAPTIONS)
    for name, batch in encoded.items():
        for tensor in batch.clone():
            packed = packing.pack({name: tensor}, "bfloat16")
            assert packed[name].dtype == torch.bfloat16
            found = packing.unpack(packed[name], packed.get(name + packing.SHAPE)).float()
            assert torch.equal(found.view(torch.int32), tensor.view(torch.int32))


def test_latents_match_the_decoder_of_the_pipeline(family: Family, model: ModelParams, pipe: Any) -> None:
    """The pipeline's decoder reverses shift and scale, which gives the VAE's own posterior."""
    pixel_values = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_images(family.load_vae(model, CPU), pixel_values)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixel_values).latent_dist
    config, factor = pipe.vae.config, family.vae_scale_factor(model)
    assert mean.shape == std.shape == (2, config.latent_channels, 32 // factor, 48 // factor)
    torch.testing.assert_close(mean / config.scaling_factor + (config.shift_factor or 0), posterior.mean)
    torch.testing.assert_close(std / config.scaling_factor, posterior.std)
    with torch.no_grad():
        expected = pipe.vae.decode(posterior.mean).sample
    torch.testing.assert_close(family.decode_latents(pipe.vae, mean), expected)


def test_prediction_is_the_pipelines_own_call(family: Family, model: ModelParams, stock: Stock, pipe: Any) -> None:
    """Inputs are recorded inside of ``pipeline.__call__`` and used again with our conditioning."""
    denoiser, calls = getattr(pipe, family.DENOISER), []
    forward = denoiser.forward

    def record(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        calls.append((args, options, output[0]))
        return output

    denoiser.forward = record
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    size = {"height": 32, "width": 32}
    pipe(CAPTIONS[:2], num_inference_steps=2, output_type="latent", generator=generators, **size, **stock.options)
    text = family.load_text(model, CPU)
    prompt = family.encode_prompts(text, CAPTIONS[:2])
    views = family.view_conditioning((32, 32), (0, 0), (32, 32))
    prompt |= {part: tensor.expand(2, -1) for part, tensor in views.items()}
    ours = family.load_denoiser(model, CPU)
    assert len(calls) == 2
    for args, options, output in calls:
        hidden = args[0] if args else options["hidden_states"]
        told = stock.timesteps(args[1] if len(args) > 1 else options["timestep"])
        with torch.no_grad():
            found = family.predict(ours, stock.unpack(pipe, hidden), told.expand(2), prompt)
        torch.testing.assert_close(found, stock.sign * stock.unpack(pipe, output), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_denoiser_accepts_max_side_and_nothing_longer(family: Family, model: ModelParams) -> None:
    denoiser = family.load_denoiser(model, CPU)
    prompt = family.encode_prompts(family.load_text(model, CPU), ["red apple"])
    prompt |= {part: tensor[None] for part, tensor in family.view_conditioning((32, 32), (0, 0), (32, 32)).items()}
    channels = common.config(model, "vae")["latent_channels"]
    limit, multiple = family.max_side(model), family.pixel_multiple(model)

    def predict(side: int) -> torch.Tensor:
        latents = torch.zeros(1, channels, 8, side // family.vae_scale_factor(model))
        return family.predict(denoiser, latents, torch.tensor([500.0]), prompt)

    assert predict(limit or 32 * multiple).isfinite().all()
    if limit is not None:
        with pytest.raises((ValueError, IndexError)):
            predict(limit + multiple)


def test_loss_from_the_cache_is_the_stock_loss(
    trained: Workspace, name: str, family: Family, stock: Stock, pipe: Any
) -> None:
    """For every row of the evaluation set, diffusers alone computes latents, text, noise, prediction and target."""
    for stage in ("prepare", "cache_latents"):
        trained.run(stage, *overrides(name))
    config = params.load(Path("params.yaml"), overrides(name)[1::2])
    model, settings = config.section(ModelParams), config.section(ValidateParams)
    eval_set = make_eval_set(settings, model, family, LatentCache(Path("data/latents")), CPU)
    found = row_losses(eval_set, family.load_denoiser(model, CPU))
    manifest = Manifest.load(Path("data/prepared"))
    items = {item.file_name: item for item in manifest.items}
    assert len(eval_set.rows) == 8
    for row, loss in zip(eval_set.rows, found, strict=True):
        item = items[row.image.file_name]
        (view,) = manifest.augmentation.views(item, 1)
        image = load_view((Path("data/raw") / item.file_name).read_bytes(), item, view, manifest.preprocessing)
        with torch.no_grad():
            assert loss == pytest.approx(stock_loss(pipe, stock, image, row, settings.seed), rel=2e-5)


def test_the_dag_end_to_end(trained: Workspace, name: str, family: Family, stock: Stock) -> None:
    for stage in ("prepare", "cache_latents", "train", "validate", "export", "report"):
        trained.run(stage, *overrides(name))
    rows = Path("reports/train/loss.csv").read_text().splitlines()[1:]
    np.testing.assert_allclose([float(row.split(",")[1]) for row in rows], case(name).LOSSES, rtol=1e-3)
    metrics = json.loads(Path("reports/export/metrics.json").read_text())
    assert max(metrics[f"export.{kind}.max_abs_error"] for kind in ("diffusers", "peft")) <= 1e-4
    assert metrics["export.effect"] > 1e-4

    pipeline = getattr(diffusers, stock.cls).from_pretrained("data/base")
    pipeline.set_progress_bar_config(disable=True)
    adapter = Path("data/export/diffusers")

    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        drawn = pipeline("red apple", num_inference_steps=2, height=32, width=32, generator=generator, output_type="np")
        return drawn.images[0]

    plain = draw()
    pipeline.load_lora_weights(adapter)
    adapted = draw()
    assert adapted.shape == (32, 32, 3) and np.abs(adapted - plain).max() > 0
    header = load_metadata(adapter / "pytorch_lora_weights.safetensors")
    assert header["modelspec.architecture"].endswith("/lora") and json.loads(header["lora_dag"])["family"] == name
    card = Path("reports/model_card.md").read_text(encoding="utf-8")
    lines = card.split("```python\n")[1].split("```")[0]
    assert f"{family.PIPELINE}.from_pretrained(" in lines
    exec(lines.replace("guidance_scale", "height=32, width=32, guidance_scale"), {})
    assert Path("sample.png").stat().st_size > 100


def test_training_and_drawing_in_bfloat16(trained: Workspace, name: str) -> None:
    """Frozen weights and autocast in half precision, in all functions where dtypes could mix."""
    for stage in ("prepare", "cache_latents", "train", "validate"):
        trained.run(stage, *overrides(name, "model.dtype=bfloat16"))
    losses = [row.split(",")[1] for row in Path("reports/train/loss.csv").read_text().splitlines()[1:]]
    np.testing.assert_allclose([float(loss) for loss in losses], case(name).LOSSES, rtol=2e-2)
