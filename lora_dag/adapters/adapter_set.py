"""Adapters of the denoiser and, with ``lora.train_text_encoder``, of CLIP's text encoders.

In a file, the denoiser's tensors have PEFT's keys. A text encoder's keys begin with the component's name, such as
``text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight``. transformers 5 renamed some modules from
``text_model.encoder...`` to ``encoder...``; files use the longer name, which diffusers reads with both releases.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lora_dag.adapters import lora
from lora_dag.core.console import Problem, UserError
from lora_dag.core.files import sha256_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from lora_dag.adapters.params import LoraParams
    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.families.protocol import Family

TARGETS = ["k_proj", "out_proj", "q_proj", "v_proj"]
"""Attention layers of a text encoder that are adapted, as in diffusers' training scripts."""
TEXT_MODEL = "text_model."
DENOISER_KEY = ""
"""Key of the denoiser where a text encoder has its component's name; recorded digests contain it."""

Config = dict[str, Any]
"""Arguments of peft.LoraConfig, except that lora_dag/adapters/bias.py defines ``bias``."""


class AdapterSet:
    """Modules of a base model, with a new adapter in each.

    Args:
        lora_config: config of the denoiser's adapter.
        text_lora: component -> config of each trained text encoder.
        encoders: component -> module; encoders that ``text_lora`` does not name are left unchanged.
    """

    def __init__(
        self, denoiser: Any, lora_config: Config, text_lora: Mapping[str, Config], encoders: Mapping[str, Any]
    ) -> None:
        self.modules: dict[str, Any] = {DENOISER_KEY: denoiser} | {name: encoders[name] for name in text_lora}
        """Component -> module; ``DENOISER_KEY`` for the denoiser."""
        self.configs: dict[str, Config] = {DENOISER_KEY: lora_config, **text_lora}
        self.trainable: dict[str, torch.nn.Parameter] = {}
        for component, module in self.modules.items():
            added = lora.inject(module, self.configs[component])
            self.trainable |= {saved_name(component, name): parameter for name, parameter in added.items()}

    @property
    def text_trainable(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters of the text encoders."""
        denoiser = self.part(DENOISER_KEY, self.trainable)
        return {name: parameter for name, parameter in self.trainable.items() if name not in denoiser}

    def keyed_init(self, seed: int) -> None:
        """Initialize every adapter from the seed and its layers' names."""
        for component, module in self.modules.items():
            lora.keyed_init(module, self.configs[component], seed, component)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the tensors of all adapters, with the keys of an adapter file."""
        return {
            saved_name(component, name): tensor
            for component, module in self.modules.items()
            for name, tensor in lora.state_dict(module).items()
        }

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load the tensors of all adapters.

        Raises:
            ValueError: a key is missing or unexpected.
        """
        for component, module in self.modules.items():
            own = self.part(component, tensors)
            lora.load(module, {name_in_module(component, module, name): tensor for name, tensor in own.items()})

    def part(self, component: str, named: Mapping[str, Any]) -> dict[str, Any]:
        """Return one component's part of tensors or parameters; a key without a component is the denoiser's."""

        def owner(name: str) -> str:
            first = name.partition(".")[0]
            return first if first in self.modules else DENOISER_KEY

        return {name: value for name, value in named.items() if owner(name) == component}

    def set_scale(self, scale: float) -> None:
        """Set the strength of all adapters: 1 as trained, 0 for the base model."""
        for module in self.modules.values():
            lora.set_scale(module, scale)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable all adapters inside the block: the modules compute the base model's output."""
        with contextlib.ExitStack() as stack:
            for module in self.modules.values():
                stack.enter_context(lora.disabled(module))
            yield

    def require_sound(self) -> None:
        """Raise RuntimeError if a trained parameter is not float32 or would not be saved."""
        for component, module in self.modules.items():
            lora.require_sound(module, self.part(component, self.trainable))

    def frozen_digest(self) -> str:
        """Return the digest of the frozen weights of all modules."""
        return frozen_digest(self.modules)


def inject_into_pipeline(pipeline: Any, denoiser: str, adapter: Adapter) -> AdapterSet:
    """Add new layers of an adapter to the modules of a loaded pipeline.

    Args:
        denoiser: attribute of the pipeline, ``unet`` or ``transformer``.
    """
    modules = {name: getattr(pipeline, name).eval().requires_grad_(False) for name in (denoiser, *adapter.text_lora)}
    return AdapterSet(modules[denoiser], adapter.lora_config, adapter.text_lora, modules)


def frozen_digest(modules: Mapping[str, Any]) -> str:
    """Return the sha256 over the frozen weights of the denoiser and of the trained text encoders.

    Args:
        modules: component -> module, as ``AdapterSet.modules``.
    """
    digests = {component: lora.frozen_digest(module) for component, module in modules.items()}
    return digests[DENOISER_KEY] if len(digests) == 1 else sha256_json(digests)


def text_configs(params: LoraParams, family: Family, encoders: Mapping[str, Any]) -> dict[str, Config]:
    """Return the adapter config of each text encoder.

    Rank, alpha, dropout and kind are the denoiser's. Patterns and excluded layers apply to the denoiser only, and no
    biases are trained.

    Raises:
        UserError: the rank is above a layer's size.
    """
    changes: dict[str, Any] = {"exclude_modules": [], "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    if params.init_lora_weights == "eva":  # computed from the denoiser's inputs
        changes["init_lora_weights"] = "kaiming"
    params = params.model_copy(update={"target_modules": TARGETS, **changes})
    configs, problems = {}, []
    for component, encoder in encoders.items():
        try:
            configs[component] = lora.make_config(params, encoder)
        except UserError as error:
            first = error.problems[0]  # one is enough: all layers of an encoder have one size
            problems.append(Problem(first.code, f"{first} This layer is in {component}."))
            continue
        if num_unused := family.TEXT_ENCODERS[component]:
            used = list(range(encoder.config.num_hidden_layers - num_unused))
            configs[component] |= {"layers_to_transform": used, "layers_pattern": "layers"}
    if problems:
        raise UserError(*problems)
    return configs


def saved_name(component: str, name: str) -> str:
    """Return a tensor's or parameter's key in an adapter file."""
    return f"{component}.{text_model_name(name)}" if component else name


def file_name(component: str, name: str) -> str:
    """Return a module's or tensor's name that every release of other programs reads."""
    return text_model_name(name) if component.startswith("text_encoder") else name


def text_model_name(name: str) -> str:
    """Return the longer name of a text encoder's module or tensor, which begins with ``text_model.``."""
    return name if name.startswith((TEXT_MODEL, "text_projection.")) else TEXT_MODEL + name


def name_in_module(component: str, module: Any, name: str) -> str:
    """Return the name in the module for a key of an adapter file: the inverse of ``saved_name``."""
    if not component:
        return name
    inner = name.removeprefix(f"{component}.")
    return inner if hasattr(module, "text_model") else inner.removeprefix(TEXT_MODEL)
