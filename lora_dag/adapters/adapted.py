"""What carries an adapter: the denoiser and, with ``lora.train_text_encoder``, CLIP's text encoders.

In a file the denoiser's keys stand as PEFT names them, and an encoder's behind its component's name:
``text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight``. transformers 5 calls some modules
``encoder...`` that 4 called ``text_model.encoder...``; files have the longer name, which diffusers reads under both.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lora_dag.adapters import lora
from lora_dag.core.console import UserError
from lora_dag.core.files import sha256_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from lora_dag.adapters.params import LoraParams
    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.families.protocol import Family

TARGETS = ["k_proj", "out_proj", "q_proj", "v_proj"]
"""Of every layer's attention, as in diffusers' training scripts."""
TEXT_MODEL = "text_model."

Config = dict[str, Any]
"""Arguments of peft.LoraConfig, and ``bias`` as lora_dag/adapters/bias.py means it."""


class Adapted:
    """The modules, with a fresh adapter in each.

    Args:
        lora_config: of the denoiser.
        text_lora: component -> config of each text encoder that is trained.
        encoders: component -> module; those that ``text_lora`` does not name are left alone.
    """

    def __init__(
        self, denoiser: Any, lora_config: Config, text_lora: Mapping[str, Config], encoders: Mapping[str, Any]
    ) -> None:
        self.modules: dict[str, Any] = {"": denoiser} | {name: encoders[name] for name in text_lora}
        """Component -> module; "" for the denoiser."""
        self.configs: dict[str, Config] = {"": lora_config, **text_lora}
        self.trainable: dict[str, torch.nn.Parameter] = {}
        for component, module in self.modules.items():
            added = lora.inject(module, self.configs[component])
            self.trainable |= {key(component, name): parameter for name, parameter in added.items()}

    @property
    def text_trainable(self) -> dict[str, torch.nn.Parameter]:
        """The text encoders' part of what is trained."""
        denoiser = self.of("", self.trainable)
        return {name: parameter for name, parameter in self.trainable.items() if name not in denoiser}

    def keyed_init(self, seed: int) -> None:
        for component, module in self.modules.items():
            lora.keyed_init(module, self.configs[component], seed, component)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {
            key(component, name): tensor
            for component, module in self.modules.items()
            for name, tensor in lora.state_dict(module).items()
        }

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill all adapters.

        Raises:
            ValueError: a key is missing or left over.
        """
        for component, module in self.modules.items():
            own = self.of(component, tensors)
            lora.load(module, {own_name(component, module, name): tensor for name, tensor in own.items()})

    def of(self, component: str, named: Mapping[str, Any]) -> dict[str, Any]:
        """One component's part of tensors or parameters; the denoiser's is what no encoder has."""

        def owner(name: str) -> str:
            first = name.partition(".")[0]
            return first if first in self.modules else ""

        return {name: value for name, value in named.items() if owner(name) == component}

    def set_scale(self, scale: float) -> None:
        """Strength of the adapter: 1 as trained, 0 the base."""
        for module in self.modules.values():
            lora.set_scale(module, scale)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone, inside the block."""
        with contextlib.ExitStack() as stack:
            for module in self.modules.values():
                stack.enter_context(lora.disabled(module))
            yield

    def require_sound(self) -> None:
        """Raises RuntimeError for a parameter that is trained and not float32, or not part of what is saved."""
        for component, module in self.modules.items():
            lora.require_sound(module, self.of(component, self.trainable))

    def frozen_digest(self) -> str:
        return frozen_digest(self.modules)


def in_pipeline(pipeline: Any, denoiser: str, adapter: Adapter) -> Adapted:
    """The adapter's layers in a loaded pipeline, fresh.

    Args:
        denoiser: ``unet`` or ``transformer``.
    """
    modules = {name: getattr(pipeline, name).eval().requires_grad_(False) for name in (denoiser, *adapter.text_lora)}
    return Adapted(modules[denoiser], adapter.lora_config, adapter.text_lora, modules)


def frozen_digest(modules: Mapping[str, Any]) -> str:
    """sha256 over what is frozen in the denoiser, and in the text encoders that are trained beside it."""
    digests = {component: lora.frozen_digest(module) for component, module in modules.items()}
    return digests[""] if len(digests) == 1 else sha256_json(digests)


def text_configs(params: LoraParams, family: Family, encoders: Mapping[str, Any]) -> dict[str, Config]:
    """Config of each text encoder: that of the denoiser but for what is said of its layers, and without biases.

    Raises:
        UserError: a rank above a layer's size.
    """
    plain: dict[str, Any] = {"exclude_modules": [], "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    if params.init_lora_weights == "eva":  # which looks at the denoiser's inputs
        plain["init_lora_weights"] = "kaiming"
    params = params.model_copy(update={"target_modules": TARGETS, **plain})
    found, problems = {}, []
    for component, encoder in encoders.items():
        try:
            found[component] = lora.make_config(params, encoder)
        except UserError as error:
            problems.append(f"{error.problems[0]} of {component}")  # its layers are of one size
            continue
        if unread := family.TEXT_ENCODERS[component]:
            read = list(range(encoder.config.num_hidden_layers - unread))
            found[component] |= {"layers_to_transform": read, "layers_pattern": "layers"}
    if problems:
        raise UserError(*problems)
    return found


def key(component: str, name: str) -> str:
    """A tensor's or parameter's name in an adapter file."""
    return f"{component}.{long_name(name)}" if component else name


def file_name(component: str, name: str) -> str:
    """A module's or tensor's name as any release of other programs knows it."""
    return long_name(name) if component.startswith("text_encoder") else name


def long_name(name: str) -> str:
    """A text encoder's module or tensor as every release of transformers knows it."""
    return name if name.startswith((TEXT_MODEL, "text_projection.")) else TEXT_MODEL + name


def own_name(component: str, module: Any, name: str) -> str:
    """``key`` undone."""
    if not component:
        return name
    own = name.removeprefix(f"{component}.")
    return own if hasattr(module, "text_model") else own.removeprefix(TEXT_MODEL)
