"""``lora.init_from``: the new adapter against the file as stock diffusers and PEFT load it."""

from __future__ import annotations

import copy
import hashlib
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline

from lora_dag.adapters import adapter_tensors, init_from_pin, lora, targets
from lora_dag.artifacts.adapter import FINAL, Adapter
from lora_dag.bases.resolve import resolve
from lora_dag.commands import draw
from lora_dag.core import params as core_params
from lora_dag.core import seeding
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import read_json, sha256_file, write_json
from lora_dag.core.params import ModelParams
from lora_dag.core.tensors import load_metadata, load_tensors, save_tensors
from lora_dag.families.protocol import load_family
from stages.export import header
from stages.export.params import ExportParams
from stages.export.source import Source
from stages.train import init_from
from tests.helpers import exports, single_files
from tests.helpers.adapters import KINDS, adapt, loaded, params, predict, unet
from tests.helpers.errors import assert_line, refused
from tests.helpers.families import stock_of
from tests.helpers.trainings import broken_off
from tests.helpers.workspace import Workspace

FILES = {
    "ours": "data/start/adapter.safetensors",
    "diffusers": "data/export/diffusers/pytorch_lora_weights.safetensors",
    "peft": "data/export/peft/adapter_model.safetensors",
    "comfyui": "data/export/comfyui/ink-icons.safetensors",
}
TARGET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def write(workspace: Workspace, **changes: Any) -> torch.Tensor:
    """Write a trained adapter in every format that supports it; return the denoiser's output with it."""
    denoiser = adapt(workspace, **changes)
    config = core_params.load(Path("params.yaml"))
    model, export = config.section(ModelParams), config.section(ExportParams)
    adapter = Adapter.load(Path("data/adapter"))
    family = load_family("sd")
    base = resolve(model, family)
    parts, fields = (
        {"unet": adapter_tensors.read(adapter.lora_config, denoiser)},
        header.header_fields(Source(export, base, family, adapter, {})),
    )
    shutil.copytree("data/adapter", "data/start")
    if changes.get("bias", "none") != "all":
        exports.write("diffusers", Path(FILES["diffusers"]).parent, family, parts, fields)
        exports.write("peft", Path(FILES["peft"]).parent, family, parts, fields)
    exports.write("comfyui", Path(FILES["comfyui"]).parent, family, parts, fields)
    return predict(denoiser)


def fill(path: str, denoiser: Any = None, base: dict[str, str] | None = None, **changes: Any) -> Any:
    """Return a new denoiser whose adapter starts from the file, and the summary for the log."""
    denoiser = denoiser or unet()
    settings = params(**changes, init_from={"path": path, "sha256": init_from_pin.digest(Path(path))})
    config = lora.make_config(settings, denoiser)
    lora.inject(denoiser, config)
    lora.keyed_init(denoiser, config, 0)
    return denoiser, init_from.fill(settings, denoiser, base or {})


def refusal(path: str, **changes: Any) -> tuple[Problem, ...]:
    with pytest.raises(UserError) as caught:
        fill(path, **changes)
    return caught.value.problems


def assert_refused(path: str, code: str, *values: str) -> None:
    """Assert that the file is refused with one problem of this code, with its setting and path before these values."""
    with refused(code, f"params.yaml lora.init_from: '{path}': ", *values):
        fill(path)


# The start


@pytest.mark.parametrize(
    "changes",
    [KINDS["rslora"], {"use_dora": True, "target_modules": ["to_q", "conv1"]}, {"bias": "lora_only"}, {"bias": "all"}],
    ids=str,
)
def test_the_adapter_starts_as_in_the_file(workspace: Workspace, changes: dict[str, Any]) -> None:
    expected, base = write(workspace, **changes), predict(unet())
    assert (expected - base).abs().max() > 0.05
    for kind, path in FILES.items():
        if Path(path).exists():
            denoiser, _ = fill(path, **changes)
            torch.testing.assert_close(predict(denoiser), expected, atol=1e-5, rtol=1e-5, msg=kind)
            with lora.disabled(denoiser):
                assert torch.equal(predict(denoiser), base)
    if changes == KINDS["rslora"]:
        torch.testing.assert_close(loaded("diffusers"), expected, atol=1e-5, rtol=1e-5)


def test_another_alpha_rescales_b(workspace: Workspace) -> None:
    expected = write(workspace)  # alpha is twice the rank
    for alpha, factor in ((2.0, "2"), (6.0, "0.6667")):
        denoiser, plan = fill(FILES["comfyui"], alpha=alpha)
        torch.testing.assert_close(predict(denoiser), expected, atol=1e-5, rtol=1e-5)
        assert "32 layers from all 96 tensors" in plan and f"B x {factor}," in plan  # with alphas
    assert "32 layers from all 64 tensors" in fill(FILES["ours"])[1] and "B x" not in fill(FILES["ours"])[1]


def test_alpha_of_a_snapshot_and_of_a_file_alone(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    """Without adapter.json there is no alpha: it is the rank, with a warning."""
    expected = write(workspace)
    Path("data/start/snapshots").mkdir()
    shutil.copy(FILES["ours"], "data/start/snapshots/step-000002.safetensors")
    denoiser, _ = fill("data/start/snapshots/step-000002.safetensors")
    torch.testing.assert_close(predict(denoiser), expected, atol=1e-6, rtol=1e-6)
    assert "alpha" not in caplog.text
    Path("data/alone").mkdir()
    shutil.copy(FILES["ours"], "data/alone/adapter.safetensors")
    assert init_from_pin.digest(Path("data/alone/adapter.safetensors")) == sha256_file(Path(FILES["ours"]))
    denoiser, _ = fill("data/alone/adapter.safetensors")
    lora.set_scale(denoiser, 2.0)
    torch.testing.assert_close(predict(denoiser), expected, atol=1e-5, rtol=1e-5)
    place = "params.yaml lora.init_from: 'data/alone/adapter.safetensors'"
    assert_line("\n".join(caplog.messages), "alpha-assumed", place)


def test_a_file_of_another_base_is_a_warning(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    write(workspace)
    recorded = read_json(Path("data/start/adapter.json"))["base"]
    for path in (FILES["ours"], FILES["peft"]):
        caplog.clear()
        fill(path, base=recorded | {"unet": "0" * 64})
        assert_line("\n".join(caplog.messages), "trained-on-other-base", f"'{path}'", "another unet")
    caplog.clear()
    fill(FILES["diffusers"], base=recorded)
    assert not caplog.text


def kohya(module: str, sizes: dict[str, tuple[int, int]], rank: int, alphas: list[float]) -> dict[str, torch.Tensor]:
    """Write random layers with kohya's keys to data/kohya.safetensors; return alpha / rank * up @ down by layer.

    Args:
        sizes: inputs and outputs of each layer of the module, as kohya names them.
    """
    tensors, changes = {}, {}
    for (name, (inputs, outputs)), alpha in zip(sizes.items(), alphas, strict=True):
        generator, key = seeding.generator(0, name), f"{module}_{name}"
        tensors[f"{key}.lora_down.weight"] = down = torch.randn(rank, inputs, generator=generator)
        tensors[f"{key}.lora_up.weight"] = up = 0.2 * torch.randn(outputs, rank, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        changes[name] = alpha / rank * up @ down
    save_tensors(Path("data/kohya.safetensors"), tensors)
    return changes


def change(denoiser: Any, name: str) -> torch.Tensor:
    """Return the adapter's change of a layer's weight."""
    return denoiser.get_submodule(name).get_delta_weight(lora.NAME)


@pytest.mark.parametrize("alphas", [[3.0] * 4, [1.0, 2.0, 3.0, 4.0]], ids=["one alpha", "several"])
def test_kohyas_layout_of_sdxl(workspace: Workspace, bases: dict[str, Path], alphas: list[float]) -> None:
    """Blocks have the original checkpoint's names. Stock diffusers loads the same file, but not several alphas."""
    pipe = StableDiffusionXLPipeline.from_pretrained(bases["sdxl"])
    leaves = ("to_q", "to_k", "to_v", "to_out_0")
    changes = kohya("lora_unet_middle_block_1_transformer_blocks_0_attn1", dict.fromkeys(leaves, (32, 32)), 2, alphas)
    targets = r"mid_block\..*attn1\.to_(q|k|v|out\.0)"
    denoiser, _ = fill("data/kohya.safetensors", copy.deepcopy(pipe.unet), target_modules=targets)
    for leaf in leaves:
        name = f"mid_block.attentions.0.transformer_blocks.0.attn1.{leaf.replace('_0', '.0')}"
        torch.testing.assert_close(change(denoiser, name), changes[leaf], atol=1e-5, rtol=1e-5)
    if len(set(alphas)) == 1:
        pipe.load_lora_weights("data", weight_name="kohya.safetensors", adapter_name=lora.NAME)
        assert lora.target_names(denoiser) == lora.target_names(pipe.unet)
        for name in lora.target_names(denoiser):
            torch.testing.assert_close(change(denoiser, name), change(pipe.unet, name))


# The original checkpoints' layers


def halves(rows: torch.Tensor) -> torch.Tensor:
    """Return scale and shift in the opposite order."""
    half = len(rows) // 2
    return torch.cat([rows[half:], rows[:half]])


FLUX_BLOCK, FLUX_SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
SD3_BLOCK, SD3_LAST = "transformer_blocks.0", "transformer_blocks.1"
ORIGINAL: dict[str, dict[str, tuple[tuple[int, int], list[str], bool]]] = {
    "flux": {
        "double_blocks.0.img_attn.qkv": ((32, 96), [f"{FLUX_BLOCK}.attn.to_{x}" for x in "qkv"], False),
        "double_blocks.0.txt_attn.qkv": ((32, 96), [f"{FLUX_BLOCK}.attn.add_{x}_proj" for x in "qkv"], False),
        "double_blocks.0.img_attn.proj": ((32, 32), [f"{FLUX_BLOCK}.attn.to_out.0"], False),
        "double_blocks.0.txt_mlp.0": ((32, 128), [f"{FLUX_BLOCK}.ff_context.net.0.proj"], False),
        "single_blocks.0.linear1": (
            (32, 224),
            [*(f"{FLUX_SINGLE}.attn.to_{x}" for x in "qkv"), f"{FLUX_SINGLE}.proj_mlp"],
            False,
        ),
        "single_blocks.0.linear2": ((160, 32), [f"{FLUX_SINGLE}.proj_out"], False),
        "final_layer.linear": ((32, 64), ["proj_out"], False),
        "final_layer.adaLN_modulation.1": ((32, 64), ["norm_out.linear"], True),
    },
    "sd3": {
        "joint_blocks.0.x_block.attn.qkv": ((32, 96), [f"{SD3_BLOCK}.attn.to_{x}" for x in "qkv"], False),
        "joint_blocks.0.x_block.attn2.qkv": ((32, 96), [f"{SD3_BLOCK}.attn2.to_{x}" for x in "qkv"], False),
        "joint_blocks.0.context_block.attn.qkv": ((32, 96), [f"{SD3_BLOCK}.attn.add_{x}_proj" for x in "qkv"], False),
        "joint_blocks.0.x_block.mlp.fc2": ((128, 32), [f"{SD3_BLOCK}.ff.net.2"], False),
        "joint_blocks.0.context_block.adaLN_modulation.1": ((32, 192), [f"{SD3_BLOCK}.norm1_context.linear"], False),
        "joint_blocks.1.context_block.adaLN_modulation.1": ((32, 64), [f"{SD3_LAST}.norm1_context.linear"], True),
        "final_layer.adaLN_modulation.1": ((32, 64), ["norm_out.linear"], True),
    },
    "z_image": {
        "layers.0.attention.qkv": ((32, 96), [f"layers.0.attention.to_{x}" for x in "qkv"], False),
        "layers.1.attention.out": ((32, 32), ["layers.1.attention.to_out.0"], False),
        "noise_refiner.0.attention.qkv": ((32, 96), [f"noise_refiner.0.attention.to_{x}" for x in "qkv"], False),
        "layers.0.feed_forward.w1": ((32, 85), ["layers.0.feed_forward.w1"], False),
        "final_layer.linear": ((32, 64), ["all_final_layer.2-1.linear"], False),
    },
}
"""Layer of the original checkpoint -> its inputs and outputs, the denoiser's layers in it, and whether halves are
swapped, as the checkpoints' own trainers stack them."""
STYLES = {
    "kohya": ("lora_unet_", "lora_down.weight", "lora_up.weight", torch.float32),
    "int64 alpha": ("lora_unet_", "lora_down.weight", "lora_up.weight", torch.int64),
    "comfyui": ("diffusion_model.", "lora_A.weight", "lora_B.weight", None),
    "comfyui, alpha": ("diffusion_model.", "lora_A.weight", "lora_B.weight", torch.bfloat16),
    "dots, down and up": ("diffusion_model.", "lora_down.weight", "lora_up.weight", torch.uint8),
}
"""Prefix, ending of A, of B, and dtype of alpha; no alpha means that of the rank."""
DEFAULT_STYLES = [
    *(("flux", "int64 alpha"), ("flux", "comfyui"), ("sd3", "kohya"), ("sd3", "comfyui, alpha")),
    *(("z_image", "comfyui"), ("z_image", "dots, down and up")),
]


def original_file(family: str, style: str, rank: int = 4, alpha: int = 3) -> dict[str, torch.Tensor]:
    """Write data/original.safetensors; return the change of each of the denoiser's layers."""
    prefix, down, up, dtype = STYLES[style]
    tensors, changes = {}, {}
    for name, ((inputs, outputs), layers, swapped) in ORIGINAL[family].items():
        generator = seeding.generator(0, name)
        key = prefix + (name if prefix.endswith(".") else name.replace(".", "_"))
        tensors[f"{key}.{down}"] = a = torch.randn(rank, inputs, generator=generator)
        tensors[f"{key}.{up}"] = b = 0.2 * torch.randn(outputs, rank, generator=generator)
        if dtype:
            tensors[f"{key}.alpha"] = torch.tensor(alpha).to(dtype)
        whole = (alpha / rank if dtype else 1.0) * b @ a
        heads = [32] * (len(layers) - 1)
        for layer, rows in zip(layers, whole.split([*heads, outputs - sum(heads)]), strict=True):
            changes[layer] = halves(rows) if swapped else rows
    save_tensors(Path("data/original.safetensors"), tensors)
    return changes


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_block_numbers_of_a_unets_original_checkpoint(
    workspace: Workspace, bases: dict[str, Path], family: str, prefix: str
) -> None:
    unet = getattr(diffusers, stock_of(family).cls).from_pretrained(bases[family]).unet
    layers = {f"{name}.weight": layer.weight.detach() for name, layer in targets.adaptable(unet).items()}
    tensors, changes = {}, {}
    for name, (there, weight) in zip(layers, single_files.unet(layers).items(), strict=True):
        generator, stem = seeding.generator(0, name), there.removesuffix(".weight")
        key = prefix + (stem if prefix.endswith(".") else stem.replace(".", "_"))
        tensors[f"{key}.lora_down.weight"] = a = torch.randn(2, *weight.shape[1:], generator=generator)
        tensors[f"{key}.lora_up.weight"] = b = torch.randn(
            len(weight), 2, *[1] * (weight.dim() - 2), generator=generator
        )
        tensors[f"{key}.alpha"] = torch.tensor(3)
        changes[name.removesuffix(".weight")] = 1.5 * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    save_tensors(Path("data/original.safetensors"), tensors)
    denoiser, _ = fill("data/original.safetensors", unet, target_modules=r".*")
    assert set(lora.target_names(denoiser)) == set(changes)
    for name, expected in changes.items():
        torch.testing.assert_close(change(denoiser, name), expected, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("family", "style"),
    [
        pytest.param(family, style, marks=[] if (family, style) in DEFAULT_STYLES else [pytest.mark.slow])
        for family in sorted(ORIGINAL)
        for style in STYLES
    ],
)
def test_stacked_layers_of_the_original_checkpoint_are_split(
    workspace: Workspace, bases: dict[str, Path], family: str, style: str
) -> None:
    changes = original_file(family, style)
    transformer = getattr(diffusers, stock_of(family).cls).from_pretrained(bases[family]).transformer
    denoiser, _ = fill("data/original.safetensors", transformer, rank=4, target_modules=list(changes))
    assert set(lora.target_names(denoiser)) == set(changes)
    for name, expected in changes.items():
        torch.testing.assert_close(change(denoiser, name), expected, atol=1e-5, rtol=1e-5, msg=name)


def test_a_flux_file_is_read_as_by_diffusers(workspace: Workspace, bases: dict[str, Path]) -> None:
    """Except the last layer, whose alpha diffusers' converter drops, and the single blocks, whose width it fixes."""
    changes = original_file("flux", "kohya")
    tensors = load_tensors(Path("data/original.safetensors"))
    pipe = FluxPipeline.from_pretrained(bases["flux"])
    pipe.load_lora_weights({n: t for n, t in tensors.items() if "double_blocks" in n}, adapter_name=lora.NAME)
    stock = {name: change(pipe.transformer, name) for name in lora.target_names(pipe.transformer)}
    assert set(stock) == {name for name in changes if name.startswith("transformer_blocks")}
    for name, found in stock.items():
        torch.testing.assert_close(found, changes[name], atol=1e-5, rtol=1e-5)


def test_original_layers_of_another_width_or_number_are_refused(workspace: Workspace, bases: dict[str, Path]) -> None:
    original_file("sd3", "comfyui")
    tensors = load_tensors(Path("data/original.safetensors"))
    transformer = StableDiffusion3Pipeline.from_pretrained(bases["sd3"]).transformer
    key = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    wide = {f"{key}.lora_B.weight": torch.ones(192, 4), f"{key}.lora_A.weight": torch.ones(4, 32)}
    save_tensors(Path("data/wide.safetensors"), tensors | wide)
    with refused("adapter-of-other-base", "'data/wide.safetensors'", f"{key} has 192 outputs", "96"):
        fill("data/wide.safetensors", copy.deepcopy(transformer), target_modules="attention")
    more = {n.replace("blocks.0", "blocks.7"): t for n, t in wide.items()}
    save_tensors(Path("data/deep.safetensors"), tensors | more)
    with refused("adapter-of-other-base", " diffusion_model.joint_blocks.7", "SD3Transformer2DModel"):
        fill("data/deep.safetensors", transformer, target_modules="attention")


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("changes", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_our_exports_of_a_transformer_are_read_back(
    workspace: Workspace, bases: dict[str, Path], family: str, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """In ComfyUI's format DoRA's rows have the original checkpoint's order, and there is no alpha."""
    changes = {"rank": 4, "alpha": 6.0, "target_modules": "all-linear"} | changes
    pipe = getattr(diffusers, stock_of(family).cls).from_pretrained(bases[family])
    config = lora.make_config(params(**changes), pipe.transformer)
    model = copy.deepcopy(pipe.transformer)
    for key, parameter in lora.inject(model, config).items():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=seeding.generator(0, key))
    parts = {"transformer": adapter_tensors.read(config, model)}
    fields = {"lora_dag": '{"base": {}}'}
    for kind in ("diffusers", "comfyui"):
        path = exports.write(kind, Path("data/files", kind), load_family(family), parts, fields)
        denoiser, plan = fill(path.as_posix(), copy.deepcopy(pipe.transformer), **changes)
        assert "B x" in plan
        for layer in lora.target_names(model):
            expected, found = (weight_of(each.get_submodule(layer)) for each in (model, denoiser))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=f"{kind} {layer}")
    assert "alpha-assumed" not in caplog.text


def weight_of(layer: Any) -> torch.Tensor:
    """Return the weight of a layer after PEFT merged the adapter."""
    layer.merge()
    return layer.get_base_layer().weight


# Files that do not fit


def test_all_settings_that_differ_are_listed_with_values_that_fit(workspace: Workspace) -> None:
    write(workspace, rank=4, alpha=2.0, target_modules=["attn1.to_q", "to_v"], use_dora=True)
    found = refusal(FILES["diffusers"], target_modules=["to_q", "to_v"], rank=2, bias="all")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    expected = (
        (
            "target_modules: got 16 layers",
            layer,
            "12 layers",
            "lora.target_modules=[attn1.to_q, attn1.to_v, attn2.to_v]",
        ),
        ("rank: got 2,", "has 4.", "lora.rank=4 lora.alpha=null"),
        ("use_dora: got false", "lora.use_dora=true"),
        ("bias: got all", "lora.bias=none"),
    )
    for problem, (start, *values) in zip(found, expected, strict=True):
        assert problem.code == "init-from-differs" and problem.startswith(f"params.yaml lora.{start}")
        assert all(value in problem for value in values), problem


def test_other_ranks_and_biases_name_the_settings(workspace: Workspace) -> None:
    write(workspace, rank_pattern={"to_v": 3}, bias="all")
    rank, biases = refusal(FILES["comfyui"], rank=4)
    assert rank.endswith("has 2 and 3. Use lora.rank=2 lora.alpha=4 lora.rank_pattern={to_v: 3}") and "got 4" in rank
    assert "lora.bias: got none" in biases and biases.endswith("lora.bias=all")
    settings = {"rank": 2, "rank_pattern": {"to_v": 3}}
    assert refusal(FILES["comfyui"], **settings, bias="lora_only")[0].endswith("lora.bias=all")
    fill(FILES["comfyui"], **settings, bias="all")


def test_eva_with_init_from_is_refused(workspace: Workspace) -> None:
    write(workspace)
    with refused("eva-with-init-from", "params.yaml lora.init_lora_weights: eva", "lora.init_from", "gaussian"):
        fill(FILES["ours"], init_lora_weights="eva")


def test_a_preset_that_fits_is_suggested(workspace: Workspace) -> None:
    write(workspace, target_modules="attention+ff")
    (problem,) = refusal(FILES["ours"], exclude_modules=["to_k"])
    assert problem.endswith(" lora.target_modules=attention+ff lora.exclude_modules=[]")


def test_files_of_another_family_or_base_are_refused(workspace: Workspace, bases: dict[str, Path]) -> None:
    write(workspace)
    flux = FluxPipeline.from_pretrained(bases["flux"]).transformer
    place = f"params.yaml lora.init_from: '{FILES['diffusers']}': "
    with refused("adapter-of-other-base", place, "unet.down_blocks", "FluxTransformer2DModel", "model.family"):
        fill(FILES["diffusers"], flux)
    tensors = load_tensors(Path(FILES["comfyui"]))
    wide = {n: torch.cat([t, t], dim=1) if n.endswith("down.weight") else t for n, t in tensors.items()}
    save_tensors(Path("data/wide.safetensors"), wide)
    sizes = ("64 inputs and 32 outputs in the file", "32 and 32", "(32 such layers)")
    with refused("adapter-of-other-base", "params.yaml lora.init_from: ", *sizes):
        fill("data/wide.safetensors")


@pytest.mark.parametrize(
    ("more", "code", "value"),
    [
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": 1}, "adapter-of-text-encoder", "1 layer"),
        ({"lora_unet_conv_in.lokr_w1": 1}, "adapter-no-lora", "1 key"),
        ({"lora_unet_conv_in.lora_down.weight": 1}, "adapter-file-damaged", "lora_unet_conv_in"),
        (
            {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.dora_scale": 32},
            "dora-scale-ambiguous",
            "lora_magnitude_vector",
        ),
    ],
    ids=["text", "lokr", "half", "dora"],
)
def test_unsupported_keys_are_refused(workspace: Workspace, more: dict[str, int], code: str, value: str) -> None:
    write(workspace)
    tensors = load_tensors(Path(FILES["comfyui"]))
    save_tensors(Path("data/other.safetensors"), tensors | {key: torch.ones(size) for key, size in more.items()})
    assert_refused("data/other.safetensors", code, value)


KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj"  # 32 inputs, 256 outputs
NO_LORA = {
    "loha": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"],
    "lokr": ["lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"],
    "oft": ["oft_blocks", "alpha"],
    "boft": ["oft_blocks", "rescale", "alpha"],
    "glora": ["a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"],
    "full": ["diff", "diff_b"],
    "norms": ["w_norm", "b_norm"],
}


@pytest.mark.parametrize("prefix", [KOHYA, "diffusion_model.layers.0.attention.qkv"])
@pytest.mark.parametrize("kind", NO_LORA)
def test_files_of_other_algorithms_are_no_lora(workspace: Workspace, kind: str, prefix: str) -> None:
    save_tensors(Path("data/other.safetensors"), {f"{prefix}.{leaf}": torch.ones(1) for leaf in NO_LORA[kind]})
    assert_refused("data/other.safetensors", "adapter-no-lora", prefix)


@pytest.mark.parametrize("shape", [(1, 32), (256, 1)], ids=["over inputs", "over outputs"])
def test_dora_scale_over_inputs_is_ambiguous(workspace: Workspace, shape: tuple[int, int]) -> None:
    """OneTrainer writes it by default, LyCORIS with wd_on_output=False."""
    tensors = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(256, 2), "alpha": torch.tensor(2.0)}
    tensors["dora_scale"] = torch.ones(shape)
    save_tensors(Path("data/dora.safetensors"), {f"{KOHYA}.{leaf}": tensor for leaf, tensor in tensors.items()})
    assert_refused("data/dora.safetensors", "dora-scale-ambiguous", "dora_scale", "diffusers")


@pytest.mark.parametrize(
    ("change", "code"),
    [({"peft_type": "LOHA"}, "adapter-no-lora"), ({"init_lora_weights": "pissa_niter_4"}, "adapter-changed-base")],
)
def test_a_config_of_another_kind_is_refused(workspace: Workspace, change: dict[str, str], code: str) -> None:
    write(workspace)
    config = Path(FILES["peft"]).with_name("adapter_config.json")
    write_json(config, read_json(config) | change)
    assert_refused(FILES["peft"], code, *change.values())
    write_json(Path("data/start/adapter.json"), read_json(Path("data/start/adapter.json")) | {"files": {}})
    assert_refused(FILES["ours"], "adapter-json-of-other-file", "data/start/adapter.json")


@pytest.mark.parametrize("cast", [torch.int8, torch.bool, torch.complex64, "nan", "inf"])
def test_tensors_that_are_no_finite_floats_are_refused(workspace: Workspace, cast: torch.dtype | str) -> None:
    write(workspace)
    tensors = load_tensors(Path(FILES["comfyui"]))
    name = min(name for name in tensors if name.endswith("up.weight"))
    odd = tensors[name] * float(cast) if isinstance(cast, str) else tensors[name].to(cast)
    save_tensors(Path("data/odd.safetensors"), tensors | {name: odd})
    code = "adapter-file-not-finite" if isinstance(cast, str) else "adapter-file-dtype"
    assert_refused("data/odd.safetensors", code, f": {name} ")


@pytest.mark.parametrize("content", [[], None, "x"])
def test_a_config_must_be_a_mapping(workspace: Workspace, content: object) -> None:
    write(workspace)
    write_json(Path(FILES["peft"]).with_name("adapter_config.json"), content)
    write_json(Path("data/start/adapter.json"), content)
    for name, config in (("peft", "adapter_config.json"), ("ours", "data/start/adapter.json")):
        assert_refused(FILES[name], "adapter-file-damaged", f"{config} is {content!r},")


def test_invalid_alphas_are_refused(workspace: Workspace) -> None:
    write(workspace)
    path = Path(FILES["peft"]).with_name("adapter_config.json")
    whole = read_json(path)
    cases: list[tuple[dict[str, Any], str]] = [
        *(({"lora_alpha": value}, f"lora_alpha is {value!r}") for value in ("x", None, [1], True)),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern '('"),
        ({"alpha_pattern": {"to_q": "x"}}, "to_q is 'x'"),
    ]
    for change, value in cases:
        write_json(path, whole | change)
        assert_refused(FILES["peft"], "adapter-alpha-invalid", value)
    path.write_text(path.read_text().replace('"x"', "1").replace('"lora_alpha": 2', '"lora_alpha": NaN'))
    assert_refused(FILES["peft"], "adapter-alpha-invalid", "lora_alpha is nan")
    write_json(path, whole | {"alpha_pattern": [1]})
    assert_refused(FILES["peft"], "adapter-file-damaged", "alpha_pattern is [1]")


@pytest.mark.parametrize(
    ("key", "value", "code", "found"),
    [
        *(("lora_adapter_metadata", value, "adapter-file-damaged", "lora_adapter_metadata") for value in ("[]", "3")),
        ("lora_adapter_metadata", "null", "adapter-file-damaged", "lora_adapter_metadata is None"),
        ("lora_adapter_metadata", '{"unet.lora_alpha": "x"}', "adapter-alpha-invalid", "lora_alpha is 'x'"),
        *(("lora_dag", value, "adapter-file-damaged", "lora_dag is ") for value in ("[]", '"x"')),
        *(("lora_dag", value, "adapter-file-damaged", "base is ") for value in ('{"base": 3}', '{"base": ["unet"]}')),
    ],
)
def test_an_invalid_header_is_refused(workspace: Workspace, key: str, value: str, code: str, found: str) -> None:
    write(workspace)
    tensors, kept = load_tensors(Path(FILES["diffusers"])), load_metadata(Path(FILES["diffusers"]))
    save_tensors(Path("data/odd.safetensors"), tensors, kept | {key: value})
    assert_refused("data/odd.safetensors", code, found)
    if key == "lora_dag":
        with pytest.raises(UserError, match="data/odd.safetensors: damaged"):
            draw.require_base(Path("data/odd.safetensors"), {"unet": "0"})


def test_a_layer_of_rank_zero_and_an_invalid_path_are_refused(workspace: Workspace) -> None:
    write(workspace)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    empty = {f"{key}.lora_down.weight": torch.zeros(0, 32), f"{key}.lora_up.weight": torch.zeros(32, 0)}
    save_tensors(Path("data/odd.safetensors"), load_tensors(Path(FILES["comfyui"])) | empty)
    assert_refused("data/odd.safetensors", "adapter-file-damaged", key)
    assert_pin("a\0.safetensors", None, "invalid-path", "params.yaml lora.init_from: 'a\\x00.safetensors'")


# The pin


def assert_pin(path: str, pinned: str | None, code: str, *values: str) -> None:
    """Assert that the pin has one problem, with this code and these values."""
    (problem,) = init_from_pin.problems(path, pinned)
    assert problem.code == code and all(value in problem for value in values), problem


def test_the_pin_covers_the_config_with_alpha(workspace: Workspace) -> None:
    write(workspace)
    path = Path(FILES["peft"])
    listed = "".join(f"{sha256_file(p)}  {p.name}\n" for p in (path.with_name("adapter_config.json"), path))
    found = hashlib.sha256(listed.encode()).hexdigest()  # cd FOLDER && sha256sum CONFIG FILE | sha256sum
    inside = str(path).replace("data/export", "data/x/../export")
    assert_pin(inside, None, "file-in-output-folder", f"'{inside}'", "data/export,", "dvc add data/start")
    shutil.copytree(path.parent, "data/my peft")
    name = f"data/my peft/{path.name}"
    assert init_from_pin.problems(name, found) == []
    accept = f"-S \"lora.init_from={{path: '{name}', sha256: {found}}}\""
    assert_pin(name, None, "pin-missing", f"params.yaml lora.init_from: '{name}'", accept)
    assert_pin(name, "f" * 64, "pin-differs", f"params.yaml lora.init_from: '{name}'", found, "f" * 64, accept)
    config = Path("data/my peft/adapter_config.json")
    config.write_text(config.read_text().replace('"lora_alpha": 2', '"lora_alpha": 5'))
    assert len(init_from_pin.problems(name, found)) == 1


def test_missing_files_and_folders_are_refused(workspace: Workspace) -> None:
    Path("data/folder").mkdir()
    Path("data/folder/a.safetensors").touch()
    Path("data/a.bin").touch()
    assert_pin("data/none.safetensors", None, "file-missing", "'data/none.safetensors'", "dvc pull")
    assert_pin("data/folder", None, "path-is-folder", "'data/folder'", "(a.safetensors)")
    assert_pin("data/a.bin", None, "no-safetensors", "'data/a.bin'")
    found = init_from_pin.digest(Path("data/folder/a.safetensors"))
    assert init_from_pin.problems("data/folder/a.safetensors", found) == []
    assert_refused("data/folder/a.safetensors", "adapter-file-damaged")


# The stage


def pinned(path: str, digest: str | None = None) -> tuple[str, str]:
    return "--set", f"lora.init_from={{path: {path}, sha256: {digest or init_from_pin.digest(Path(path))}}}"


def test_a_training_starts_from_the_file_and_resumes_bit_identically(workspace: Workspace) -> None:
    for stage in ("prepare", "cache_latents", "train"):
        workspace.run(stage)
    fresh = workspace.tree("data/adapter")
    assert b'"init_from": null' in fresh["adapter.json"]
    Path("data/start").mkdir()
    for name in ("adapter.json", FINAL):
        shutil.copy(f"data/adapter/{name}", f"data/start/{name}")
    path = FILES["ours"]
    workspace.run("check", *pinned(path))
    with refused("init-from-differs", "--set lora.rank: got 4", "lora.rank=2 lora.alpha=null"):
        workspace.run("check", *pinned(path), "--set", "lora.rank=4")
    for stage in ("check", "train"):
        with refused("pin-differs", "--set lora.init_from: ", "f" * 64, "-S "):
            workspace.run(stage, *pinned(path, "f" * 64))
    assert workspace.tree("data/adapter") == fresh

    lines = workspace.run("train", *pinned(path))
    digest = init_from_pin.digest(Path(path))
    (start,) = [line for line in lines if line.startswith("start ")]
    assert f"{path} ({digest[:12]}), 32 layers from all 64 tensors" in start
    whole = workspace.tree("data/adapter")
    assert whole[FINAL] != fresh[FINAL]
    assert read_json(Path("data/adapter/adapter.json"))["made_from"]["lora"]["init_from"] == {"sha256": digest}
    assert path.encode() not in b"".join(whole.values())

    shutil.move("data/start", "data/moved")
    moved = pinned("data/moved/adapter.safetensors")
    with broken_off(3):
        workspace.run("train", *moved)
    workspace.run("train")  # another run, which does not use the checkpoint
    assert workspace.tree("data/adapter") == fresh
    assert "resumed from step 2" in workspace.run("train", *moved)
    assert workspace.tree("data/adapter") == whole
