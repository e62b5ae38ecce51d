"""LoRA, LoKr or LoHa on a denoiser, by PEFT, and trained biases: inject, read out, load, scale, merge.

Adapters are float32 whatever the frozen dtype is. The config is that of peft.LoraConfig but for ``bias``, which
bias.py defines: PEFT's own writes over the base's biases. Of another ``algo`` it has the same names.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from lora_dag.adapters import bias, lycoris
from lora_dag.adapters.targets import lora_settings
from lora_dag.core import seeding

if TYPE_CHECKING:
    from lora_dag.adapters.params import LoraParams

NAME = "default"


def make_config(params: LoraParams, denoiser: Any) -> dict[str, Any]:
    """The adapter's config for this denoiser.

    Raises:
        UserError: a target or pattern that matches no layer, with the nearest names; a rank above a layer's size.
    """
    config = {"r": params.rank, "lora_alpha": params.alpha, "bias": params.bias} | lora_settings(params, denoiser)
    if params.algo != "lora":
        return config | lycoris.make_config(params)
    start_of_a = True if params.init_lora_weights == "kaiming" else params.init_lora_weights
    return config | {"lora_dropout": params.dropout, "init_lora_weights": start_of_a}


def keyed_init(denoiser: Any, config: dict[str, Any], seed: int, component: str = "") -> None:
    """PEFT's own initialisation, layer by layer, keyed by the layer's name: other targets do not change it.

    ``component`` tells the layers of two text encoders apart.

    DoRA's magnitudes are the norms of the base's rows in float32: PEFT's own are rounded to the frozen dtype, and
    step 0 would not equal the base.
    """
    for name in targets(denoiser):
        torch.manual_seed(seeding.key(seed, "lora_init", *filter(None, [component]), name))
        layer = denoiser.get_submodule(name)
        if "algo" in config:
            layer.reset_adapter_parameters(NAME)
            continue
        layer.reset_lora_parameters(NAME, start(config))
        if NAME in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[NAME]
            zero = torch.zeros_like(layer.get_base_layer().weight, dtype=torch.float32)
            with torch.no_grad():
                magnitude.weight.copy_(magnitude.get_weight_norm(zero + layer.get_base_layer().weight, zero, scaling=1))


def start(config: dict[str, Any]) -> Any:
    """PEFT's ``init_lora_weights``; eva's A, which takes batches, is filled in by the training."""
    return True if config["init_lora_weights"] == "eva" else config["init_lora_weights"]


def inject(denoiser: Any, config: dict[str, Any]) -> dict[str, torch.nn.Parameter]:
    """Add a fresh adapter; return its parameters by name, float32 and requiring gradients. All else stays frozen."""
    denoiser.add_adapter(peft_config(config), adapter_name=NAME)
    lycoris.answer_as_the_base(denoiser)
    bias.add(denoiser, config.get("bias", "none"))
    trainable = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
    return trainable


def peft_config(config: dict[str, Any], **changes: Any) -> LoraConfig | LoKrConfig | LoHaConfig:
    """PEFT's part of an adapter's config."""
    if "algo" in config:
        return lycoris.peft_config(config | changes)
    return LoraConfig(**config | {"bias": "none", "init_lora_weights": start(config)} | changes)


def state_dict(denoiser: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors, keys as PEFT names them (``...to_q.lora_A.weight``), and ``...to_out.0.bias_delta``."""
    # "auto" asks the Hub whether a text encoder's vocabulary was changed.
    tensors = get_peft_model_state_dict(denoiser, adapter_name=NAME, save_embedding_layers=False)
    return tensors | bias.state_dict(denoiser)


def load(denoiser: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Fill the injected adapter.

    Raises:
        ValueError: a key is missing or left over, such as biases of another mode.
    """
    missing = set(state_dict(denoiser)) ^ set(tensors)
    if missing:
        raise ValueError(f"adapter keys do not match the injected layers: {sorted(missing)[:4]}")
    bias.load(denoiser, tensors)
    own = {name: tensor for name, tensor in tensors.items() if not name.endswith(bias.KEY)}
    set_peft_model_state_dict(denoiser, own, adapter_name=NAME)


def set_scale(denoiser: Any, scale: float) -> None:
    """Strength of the adapter, biases included: 1 as trained, 0 the base."""
    for name in targets(denoiser):
        denoiser.get_submodule(name).set_scale(NAME, scale)
    bias.set_scale(denoiser, scale)


@contextlib.contextmanager
def disabled(denoiser: Any) -> Iterator[None]:
    """The base alone, inside the block."""
    denoiser.disable_adapters()
    bias.set_enabled(denoiser, False)
    try:
        yield
    finally:
        denoiser.enable_adapters()
        bias.set_enabled(denoiser, True)


def merge(module: Any) -> None:
    """Put the adapter and the biases into the base's weights, by PEFT, and take the layers off."""
    for name in targets(module):
        module.get_submodule(name).merge(adapter_names=[NAME])
    bias.remove(module, keep=True)
    delete(module)


def delete(module: Any) -> None:
    """The base as it was before ``inject``, its parameters under their own names."""
    from diffusers.utils import recurse_remove_peft_layers

    bias.remove(module)
    recurse_remove_peft_layers(module)
    del module.peft_config
    module._hf_peft_config_loaded = False


def targets(denoiser: Any) -> list[str]:
    """Names of the layers that carry the adapter."""
    return [name for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)]


def require_sound(denoiser: Any, trainable: dict[str, torch.nn.Parameter]) -> None:
    """Every trained parameter is float32 and part of what is saved.

    Raises:
        RuntimeError: naming the first that is not.
    """
    saved = {tensor.data_ptr() for tensor in state_dict(denoiser).values()}
    for name, parameter in trainable.items():
        if parameter.dtype != torch.float32:
            raise RuntimeError(f"{name} is {parameter.dtype}, not float32")
        if parameter.data_ptr() not in saved:
            raise RuntimeError(f"{name} is trained but would not be saved")


def frozen_digest(denoiser: Any) -> str:
    """sha256 over the base's parameters and buffers by their names, the same with and without an adapter."""
    total = hashlib.sha256()
    tensors = [*denoiser.named_parameters(), *denoiser.named_buffers()]
    frozen = [(bias.base_name(name), tensor) for name, tensor in tensors if not tensor.requires_grad]
    for name, tensor in sorted(frozen, key=lambda pair: pair[0]):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
