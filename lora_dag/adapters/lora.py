"""LoRA, LoKr or LoHa layers of a denoiser, by PEFT, and trained biases: inject, save, load, scale, merge.

Adapters are float32 for every dtype of the frozen weights. The config has the arguments of peft.LoraConfig for every
``algo``, except ``bias``, which bias.py defines: PEFT's own option overwrites the base's biases.
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
from lora_dag.core.progress import ByteBar

if TYPE_CHECKING:
    from lora_dag.adapters.params import LoraParams

NAME = "default"


def make_config(params: LoraParams, denoiser: Any) -> dict[str, Any]:
    """Return the adapter's config for this denoiser.

    Raises:
        UserError: a target or pattern matches no layer, or a rank is above a layer's size.
    """
    config = {"r": params.rank, "lora_alpha": params.alpha, "bias": params.bias} | lora_settings(params, denoiser)
    if params.algo != "lora":
        return config | lycoris.make_config(params)
    init_of_a = True if params.init_lora_weights == "kaiming" else params.init_lora_weights
    return config | {"lora_dropout": params.dropout, "init_lora_weights": init_of_a}


def keyed_init(denoiser: Any, config: dict[str, Any], seed: int, component: str = "") -> None:
    """Initialize each layer by PEFT with a seed of its own, so that other targets do not change a layer's start.

    DoRA's magnitudes are computed as float32 norms of the base's rows. PEFT rounds them to the frozen dtype, and then
    the output at step 0 would differ from the base.

    Args:
        component: text encoder that contains the layers, as part of their seeds; empty for the denoiser.
    """
    for name in target_names(denoiser):
        torch.manual_seed(seeding.key(seed, "lora_init", *filter(None, [component]), name))
        layer = denoiser.get_submodule(name)
        if "algo" in config:
            layer.reset_adapter_parameters(NAME)
            continue
        layer.reset_lora_parameters(NAME, init_weights_argument(config))
        if NAME in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[NAME]
            zero = torch.zeros_like(layer.get_base_layer().weight, dtype=torch.float32)
            with torch.no_grad():
                magnitude.weight.copy_(magnitude.get_weight_norm(zero + layer.get_base_layer().weight, zero, scaling=1))


def init_weights_argument(config: dict[str, Any]) -> Any:
    """Return PEFT's argument ``init_lora_weights``; for eva the training fills A later, from its batches."""
    return True if config["init_lora_weights"] == "eva" else config["init_lora_weights"]


def inject(denoiser: Any, config: dict[str, Any]) -> dict[str, torch.nn.Parameter]:
    """Add a new adapter and return its parameters by name, float32 and trainable. All other weights stay frozen."""
    denoiser.add_adapter(peft_config(config), adapter_name=NAME)
    lycoris.keep_base_dtype(denoiser)
    bias.add(denoiser, config.get("bias", "none"))
    trainable = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
    return trainable


def peft_config(config: dict[str, Any], **changes: Any) -> LoraConfig | LoKrConfig | LoHaConfig:
    """Return the PEFT config for an adapter's config."""
    if "algo" in config:
        return lycoris.peft_config(config | changes)
    return LoraConfig(**config | {"bias": "none", "init_lora_weights": init_weights_argument(config)} | changes)


def state_dict(denoiser: Any) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors with PEFT's keys (``...to_q.lora_A.weight``), and biases (``...bias_delta``)."""
    # The default "auto" sends a request to the Hub for a text encoder's vocabulary.
    tensors = get_peft_model_state_dict(denoiser, adapter_name=NAME, save_embedding_layers=False)
    return tensors | bias.state_dict(denoiser)


def load(denoiser: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Load tensors into the injected adapter.

    Raises:
        ValueError: a key is missing or unexpected, such as a bias of another mode.
    """
    different = set(state_dict(denoiser)) ^ set(tensors)
    if different:
        raise ValueError(f"adapter keys do not match the injected layers: {sorted(different)[:4]}")
    bias.load(denoiser, tensors)
    peft_tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(bias.KEY)}
    set_peft_model_state_dict(denoiser, peft_tensors, adapter_name=NAME)


def set_scale(denoiser: Any, scale: float) -> None:
    """Set the strength of the adapter, biases included: 1 as trained, 0 for the base model."""
    for name in target_names(denoiser):
        denoiser.get_submodule(name).set_scale(NAME, scale)
    bias.set_scale(denoiser, scale)


@contextlib.contextmanager
def disabled(denoiser: Any) -> Iterator[None]:
    """Disable the adapter inside the block: the module computes the base model's output."""
    denoiser.disable_adapters()
    bias.set_enabled(denoiser, False)
    try:
        yield
    finally:
        denoiser.enable_adapters()
        bias.set_enabled(denoiser, True)


def merge(module: Any) -> None:
    """Merge adapter and biases into the base's weights, by PEFT, and remove the adapter's layers."""
    for name in target_names(module):
        module.get_submodule(name).merge(adapter_names=[NAME])
    bias.remove(module, keep=True)
    delete(module)


def delete(module: Any) -> None:
    """Remove the adapter: modules and names of parameters are again those before ``inject``."""
    from diffusers.utils import recurse_remove_peft_layers

    bias.remove(module)
    recurse_remove_peft_layers(module)
    del module.peft_config
    module._hf_peft_config_loaded = False


def target_names(denoiser: Any) -> list[str]:
    """Return the names of the adapted layers."""
    return [name for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)]


def require_sound(denoiser: Any, trainable: dict[str, torch.nn.Parameter]) -> None:
    """Require that every trained parameter is float32 and would be saved.

    Raises:
        RuntimeError: names the first parameter that is not.
    """
    saved = {tensor.data_ptr() for tensor in state_dict(denoiser).values()}
    for name, parameter in trainable.items():
        if parameter.dtype != torch.float32:
            raise RuntimeError(f"{name} is {parameter.dtype}, not float32")
        if parameter.data_ptr() not in saved:
            raise RuntimeError(f"{name} is trained but would not be saved")


def frozen_digest(denoiser: Any) -> str:
    """Return the sha256 over the base's parameters and buffers, which is the same with and without an adapter."""
    tensors = [*denoiser.named_parameters(), *denoiser.named_buffers()]
    frozen = [(bias.base_name(name), tensor) for name, tensor in tensors if not tensor.requires_grad]
    total = hashlib.sha256()
    with ByteBar("hash", sum(tensor.nbytes for _, tensor in frozen)) as bar:
        for name, tensor in sorted(frozen, key=lambda pair: pair[0]):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # without a copy
            bar.add_bytes(tensor.nbytes)
    return total.hexdigest()
