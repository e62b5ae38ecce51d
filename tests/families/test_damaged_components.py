"""Components whose configs, tokenizers and weights do not fit each other: an error that names the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_dag.core.params import ModelParams
from lora_dag.families import common, sd
from tests.helpers.errors import refused

CPU = torch.device("cpu")
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model(tiny_base: Path, tmp_path: Path) -> ModelParams:
    shutil.copytree(tiny_base, tmp_path / "base")
    return ModelParams(family="sd", pretrained=str(tmp_path / "base"), variant=None, dtype="float32", quantization=None)


def edit_weights(model: ModelParams, component: str, change: Callable[[Tensors], None]) -> None:
    file = Path(model.pretrained) / component / WEIGHTS[component]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit_config(model: ModelParams, file: str, **values: object) -> None:
    path = Path(model.pretrained) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def widest(tensors: Tensors) -> str:
    return max(tensors, key=lambda name: tensors[name].numel())


@pytest.mark.parametrize("component", WEIGHTS)
def test_a_missing_tensor_is_never_made_up(model: ModelParams, component: str) -> None:
    def drop(tensors: Tensors) -> None:
        del tensors[widest(tensors)]

    edit_weights(model, component, drop)
    with refused("base-damaged", f"{model.pretrained}/{component}: 1 tensor of config.json is missing"):
        common.load_frozen(model, component, CPU)


@pytest.mark.parametrize("component", WEIGHTS)
def test_a_tensor_of_another_size(model: ModelParams, component: str) -> None:
    def cut(tensors: Tensors) -> None:
        name = widest(tensors)
        tensors[name] = tensors[name][:-1].contiguous()

    edit_weights(model, component, cut)
    with refused("base-damaged", f"{model.pretrained}/{component}: ", ".weight", "Fetch the model again."):
        common.load_frozen(model, component, CPU)


def test_attention_of_the_vae_in_the_names_of_old_files_is_loaded(model: ModelParams) -> None:
    """The VAE of Stable Diffusion 1.5 has them."""
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=1).save_pretrained(Path(model.pretrained) / "vae")
    expected = common.load_vae(model, CPU).state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".mid_block.attentions.0." in f".{name}"]:
            for new, before in old.items():
                if f".{new}." in name:
                    tensors[name.replace(f".{new}.", f".{before}.")] = tensors.pop(name)

    edit_weights(model, "vae", rename)
    assert any(".query." in name for name in load_file(Path(model.pretrained) / "vae" / WEIGHTS["vae"]))
    loaded = common.load_vae(model, CPU).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_config_that_builds_no_model(model: ModelParams) -> None:
    edit_config(model, "unet/config.json", block_out_channels="wide")
    with refused("base-damaged", f"{model.pretrained}/unet: its files cannot be loaded ("):
        common.load_denoiser(model, CPU)


def test_a_tokenizer_without_contents(model: ModelParams) -> None:
    (Path(model.pretrained) / "tokenizer/tokenizer.json").write_text("{}")
    with refused(
        "base-damaged", f"{model.pretrained}/tokenizer: its files cannot be loaded (KeyError: 'added_tokens')"
    ):
        sd.load_tokenizer(model)


def test_a_scheduler_with_a_value_that_it_does_not_have(model: ModelParams) -> None:
    edit_config(model, "scheduler/scheduler_config.json", beta_schedule="steep")
    with refused("base-damaged", f"{model.pretrained}/scheduler: its files cannot be loaded (", "steep"):
        common.load_scheduler(model)
