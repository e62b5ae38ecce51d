"""Features of FLUX.1: packed latents, positions of patches, guidance as an input of the transformer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from lora_dag.core.params import ModelParams
from lora_dag.families import flux
from tests.helpers.errors import refused
from tests.helpers.families import case, stock_of
from tests.helpers.workspace import Workspace

CPU = torch.device("cpu")
SHAPES = ((1, 16, 8, 8), (2, 16, 4, 12), (3, 16, 12, 4), (2, 4, 2, 2))


def params(base: Path) -> ModelParams:
    return ModelParams(family="flux", pretrained=str(base), variant=None, dtype="float32", quantization=None)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_is_the_pipelines_and_unpacking_undoes_it(shape: tuple[int, int, int, int]) -> None:
    latents, (height, width) = draw(*shape), shape[2:]
    packed = flux.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, *shape))
    assert torch.equal(flux.unpack(packed, height, width), latents)
    assert torch.equal(FluxPipeline._unpack_latents(packed, height * 8, width * 8, 8), latents)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_places_of_patches_are_the_pipelines(shape: tuple[int, int, int, int]) -> None:
    rows, columns = shape[2] // 2, shape[3] // 2
    expected = FluxPipeline._prepare_latent_image_ids(1, rows, columns, CPU, torch.float32)
    assert torch.equal(flux.image_ids(rows, columns, CPU), expected)


@pytest.mark.parametrize("distilled", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize("size", [(8, 8), (4, 12)], ids=str)
def test_prediction_with_and_without_guidance(tmp_path: Path, distilled: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    pipe = case("flux").build(guidance_embeds=distilled)
    pipe.save_pretrained(tmp_path)
    noisy, timesteps = draw(2, 16, *size), torch.tensor([3.0, 1000.0])
    prompt = flux.encode_prompts(flux.load_text(params(tmp_path), CPU), ["red apple", ""])
    with torch.no_grad():
        found = flux.predict(flux.load_denoiser(params(tmp_path), CPU), noisy, timesteps, prompt)
        expected = stock_of("flux").call(pipe, noisy, timesteps, prompt)
    assert found.shape == noisy.shape
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.fixture
def on_flux(workspace: Workspace, bases: dict[str, Path]) -> Workspace:
    Path("data/base").unlink()
    Path("data/base").symlink_to(bases["flux"])
    return workspace


@pytest.mark.parametrize("stage", ["check", "validate"])
def test_a_negative_prompt_is_refused(on_flux: Workspace, stage: str) -> None:
    with refused("setting-ignored", "--set validate.negative_prompt", "FluxPipeline", "''"):
        on_flux.run(stage, "--set", "model.family=flux", "--set", "validate.negative_prompt=blurry")


def test_a_side_that_cannot_be_packed_is_refused(on_flux: Workspace) -> None:
    with refused("resolution-not-multiple", "--set dataset.resolution: got 36", "multiples of 8", "Write 32 or 40."):
        on_flux.run("check", "--set", "model.family=flux", "--set", "dataset.resolution=36")


def test_t5_sets_the_token_limit(bases: dict[str, Path]) -> None:
    assert flux.max_tokens(params(bases["flux"])) == 512
    assert flux.count_tokens(params(bases["flux"]), ["thing " * 600])[0] > 512
