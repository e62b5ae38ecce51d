"""Adapters of denoiser and text encoders against stock pipelines with PEFT layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig

from lora_dag.adapters import adapter_set, lora
from lora_dag.adapters.adapter_set import AdapterSet
from lora_dag.core import seeding
from lora_dag.core.console import UserError
from lora_dag.core.params import FAMILIES, ModelParams
from lora_dag.families.protocol import Family, load_family
from tests.helpers.adapters import params
from tests.helpers.errors import assert_problem
from tests.helpers.families import stock_of

CPU = torch.device("cpu")
CAPTIONS = ["red apple", "blue boat", ""]


@pytest.fixture(params=sorted(name for name in FAMILIES if load_family(name).TEXT_ENCODERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def family(name: str) -> Family:
    return load_family(name)


@pytest.fixture
def model(name: str, bases: dict[str, Path]) -> ModelParams:
    return ModelParams(family=name, pretrained=str(bases[name]), variant=None, dtype="float32", quantization=None)


def load(family: Family, model: ModelParams, **changes: Any) -> tuple[AdapterSet, Any]:
    """Return a new adapter of the family's denoiser and text encoders, and the family's text object."""
    denoiser, text = family.load_denoiser(model, CPU), family.load_trainable_text(model, CPU)
    encoders, settings = family.text_encoders(text), params(target_modules=["to_q"], **changes)
    text_lora = adapter_set.text_configs(settings, family, encoders)
    layers = AdapterSet(denoiser, lora.make_config(settings, denoiser), text_lora, encoders)
    layers.keyed_init(0)
    return layers, text


def fill(layers: AdapterSet) -> None:
    """Fill the parameters with random values, as after a training: B is not zero."""
    for name, parameter in layers.trainable.items():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=seeding.generator(0, "test", name))


def stock_pipeline(name: str, model: ModelParams) -> Any:
    return getattr(diffusers, stock_of(name).cls).from_pretrained(model.pretrained)


@pytest.fixture
@torch.no_grad()
def cached(family: Family, model: ModelParams) -> dict[str, torch.Tensor]:
    return family.encode_prompts(family.load_text(model, CPU), CAPTIONS)


def objective(prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a scalar that depends on every feature of every token."""
    drawn = {part: torch.randn(t.shape, generator=seeding.generator(0, "test", part)) for part, t in prompt.items()}
    return sum((tensor * drawn[part]).sum() for part, tensor in prompt.items())  # type: ignore[return-value]


KINDS: dict[str, dict[str, Any]] = {"sd": {"use_dora": True}, "sdxl": {"use_rslora": True}}


def test_gradients_equal_plain_peft_in_the_stock_pipeline(
    name: str, family: Family, model: ModelParams, cached: dict[str, torch.Tensor]
) -> None:
    kind = KINDS.get(name, {})
    layers, text = load(family, model, **kind)
    fill(layers)
    found = cached | family.encode_prompts(text, CAPTIONS, cached)
    objective(found).backward()

    pipe, expected, tensors = stock_pipeline(name, model), {}, layers.state_dict()
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]} | kind
    for component in layers.configs.keys() - {""}:
        encoder = getattr(pipe, component).requires_grad_(False)
        encoder.add_adapter(LoraConfig(**config))
        for own, parameter in encoder.named_parameters():
            in_file = f"{component}.text_model.{own.removeprefix('text_model.')}".replace(".default", "")
            value = tensors.get(in_file, tensors.get(in_file.removesuffix(".weight")))  # PEFT's name of a magnitude
            if parameter.requires_grad and value is not None:
                parameter.data = value.clone()
                expected[in_file] = parameter
    reference = stock_of(name).encode(pipe, CAPTIONS)
    objective(reference).backward()
    for part, tensor in reference.items():
        torch.testing.assert_close(found[part], tensor)

    assert len(expected) == len(layers.text_trainable) > 0
    for own, parameter in layers.text_trainable.items():
        assert parameter.grad is not None and bool(parameter.grad.any()), own
        torch.testing.assert_close(parameter.grad, expected[own.replace(".default", "")].grad)
    trained = {id(parameter) for parameter in layers.trainable.values()}
    assert all(id(p) in trained or p.grad is None for module in layers.modules.values() for p in module.parameters())


def test_an_unused_text_encoder_layer_is_not_adapted(bases: dict[str, Path]) -> None:
    """SDXL uses the penultimate layer of the first encoder."""
    model = ModelParams(family="sdxl", pretrained=str(bases["sdxl"]), variant=None, dtype="float32", quantization=None)
    layers, text = load(load_family("sdxl"), model)
    targets = {component: lora.target_names(module) for component, module in layers.modules.items() if component}
    assert {len(found) for found in targets.values()} == {4, 8}
    assert not any("layers.1." in found for found in targets["text_encoder"])
    before = load_family("sdxl").encode_prompts(text, CAPTIONS)
    for parameter in text["text_encoder"][1].encoder.layers[1].parameters():
        parameter.data.add_(1)
    after = load_family("sdxl").encode_prompts(text, CAPTIONS)
    assert all(torch.equal(tensor, after[part]) for part, tensor in before.items())


@pytest.mark.parametrize("name", ["sd", "sdxl"], indirect=True)
@torch.no_grad()
def test_a_new_disabled_or_scaled_to_zero_adapter_equals_the_base(
    family: Family, model: ModelParams, cached: dict[str, torch.Tensor]
) -> None:
    layers, text = load(family, model)
    base, digest = family.load_trainable_text(model, CPU), layers.frozen_digest()
    denoiser = family.load_denoiser(model, CPU)
    assert digest == adapter_set.frozen_digest({"": denoiser, **family.text_encoders(base)})
    plain = family.encode_prompts(base, CAPTIONS, cached)

    def is_base() -> bool:
        found = family.encode_prompts(text, CAPTIONS, cached)
        return all(torch.equal(tensor, plain[part]) for part, tensor in found.items())

    assert is_base()
    fill(layers)
    assert not is_base() and layers.frozen_digest() == digest
    with layers.disabled():
        assert is_base()
    layers.set_scale(0)
    assert is_base()
    layers.set_scale(1)
    assert not is_base()
    last = list(layers.modules.values())[-1]
    next(p for p in last.parameters() if not p.requires_grad).data.view(-1)[0] += 1
    assert layers.frozen_digest() != digest


@pytest.mark.parametrize("name", ["sd", "sdxl"], indirect=True)
@torch.no_grad()
def test_saved_tensors_are_loaded_by_component(
    family: Family, model: ModelParams, cached: dict[str, torch.Tensor]
) -> None:
    one, text = load(family, model)
    fill(one)
    one.require_sound()
    tensors = one.state_dict()
    longer = f"text_encoder.text_model.encoder.layers.0.self_attn.{adapter_set.TARGETS[0]}.lora_A.weight"
    assert longer in tensors and len(tensors) == len(one.trainable)
    assert {key.partition(".")[0] for key in tensors if ".self_attn." in key} == set(family.TEXT_ENCODERS)
    other, other_text = load(family, model)
    other.load_state_dict(tensors)
    found, expected = (family.encode_prompts(t, CAPTIONS, cached) for t in (other_text, text))
    assert all(torch.equal(tensor, expected[part]) for part, tensor in found.items())
    with pytest.raises(ValueError, match="adapter keys do not match"):
        other.load_state_dict({key: tensor for key, tensor in tensors.items() if key != longer})
    with pytest.raises(ValueError, match="adapter keys do not match"):
        AdapterSet(family.load_denoiser(model, CPU), one.configs[""], {}, {}).load_state_dict(tensors)


def test_two_encoders_have_different_starts_and_the_denoiser_its_own(bases: dict[str, Path]) -> None:
    model = ModelParams(family="sd3", pretrained=str(bases["sd3"]), variant=None, dtype="float32", quantization=None)
    layers, _ = load(load_family("sd3"), model)
    tensors, leaf = layers.state_dict(), "text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    one, other = (tensors[f"{component}.{leaf}"].flatten()[:16] for component in ("text_encoder", "text_encoder_2"))
    assert not torch.equal(one, other)
    denoiser = load_family("sd3").load_denoiser(model, CPU)
    config = lora.make_config(params(target_modules=["to_q"]), denoiser)
    lora.inject(denoiser, config)
    lora.keyed_init(denoiser, config, 0)
    alone = lora.state_dict(denoiser)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in alone.items())


def test_a_rank_above_an_encoders_layers_is_refused(bases: dict[str, Path]) -> None:
    model = ModelParams(family="sdxl", pretrained=str(bases["sdxl"]), variant=None, dtype="float32", quantization=None)
    with pytest.raises(UserError) as caught:
        load(load_family("sdxl"), model, rank=33)
    for size, component in ((16, " text_encoder."), (32, " text_encoder_2.")):
        values = ("params.yaml lora.rank: got 33", "'k_proj'", f"{size}", component)
        assert_problem(caught.value, "rank-too-high", *values)
    assert len(caught.value.problems) == 2


def test_patterns_and_biases_apply_to_the_denoiser_only(bases: dict[str, Path]) -> None:
    model = ModelParams(family="sd", pretrained=str(bases["sd"]), variant=None, dtype="float32", quantization=None)
    layers, _ = load(load_family("sd"), model, rank_pattern={"to_q": 4}, alpha_pattern={"to_q": 3.0}, bias="all")
    config = layers.configs["text_encoder"]
    assert (config["r"], config["lora_alpha"], config["bias"]) == (2, 4.0, "none")
    assert "rank_pattern" not in config and not any("bias" in name for name in layers.text_trainable)
