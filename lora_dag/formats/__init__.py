"""The file formats that an adapter is exported in: one module each, named as ``export.formats`` names it.

To add a format, add one file that defines everything in ``Format`` below. The params class, the export stage and its
parity check, the Snakefile, the model card, the tables of the report and `lora-dag push` read this folder.
Importing a format must not import torch: the Snakefile and the report read its constants.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lora_dag.adapters.adapter_tensors import AdapterTensors
    from lora_dag.adapters.base_modules import BaseModules
    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.core.params import ModelParams
    from lora_dag.families.protocol import Family

FORMATS = tuple(module.name for module in pkgutil.iter_modules(__path__))
"""Names of the formats: the modules in this folder."""


class Format(Protocol):
    """What ``lora_dag/formats/NAME.py`` defines; the module itself is the object."""

    FILE: str
    """Main file below the format's folder; ``{name}`` in it is ``export.name``."""
    READER: str
    """Program or function that loads the file back for the parity check, as the report names it."""
    IS_ADAPTER: bool
    """Whether the files hold the adapter alone; a whole pipeline has no copies of a smaller rank."""
    LOADED_BY_PEFT: bool
    """Whether PEFT holds the loaded adapter: it cannot fuse a trained bias into a layer that has no bias."""
    LIMIT: str
    """Sentence of the model card about what the parity check does not prove; empty for none."""

    def refuse(self, adapter: AdapterKind) -> str:
        """The part of this adapter that the format would lose or change; empty where it holds all of it."""

    def write(self, export: Export, folder: Path) -> None:
        """Write the files into ``folder``, which does not exist yet."""

    def load_back(self, export: Export, folder: Path) -> LoadedBack:
        """Load the files into a fresh base, by other people's code where there is some.

        Raises:
            RuntimeError: the files hold something else than what was exported.
        """

    def usage(self, card: Card) -> str:
        """Markdown of the model card that says how the files are loaded."""


@dataclass(frozen=True)
class AdapterKind:
    """What decides whether a format can hold an adapter."""

    algo: str
    """``lora.algo``."""
    bias: str
    """``lora.bias`` where biases are trained, else none."""
    use_dora: bool
    rank: int
    """Largest of its layers."""
    denoiser: str
    """``unet`` or ``transformer``."""
    trains_text: bool
    """Whether text encoders are trained."""


@dataclass(frozen=True)
class LoadedBack:
    """A fresh base with the files loaded."""

    modules: BaseModules
    unread: list[str]
    """Keys of the files that the modules did not take."""
    disable: Callable[[], object] | None
    """Takes the adapter's effect off; None where the files hold a whole pipeline."""


@dataclass(frozen=True)
class Export:
    """What a format writes, and the base that its reader starts from."""

    name: str
    """``export.name``."""
    model: ModelParams
    """The base, in float32."""
    family: Family
    device: torch.device
    adapter: Adapter
    weights: dict[str, torch.Tensor]
    """Tensors of the adapter's file."""
    tensors: dict[str, AdapterTensors]
    """Component -> its part of the adapter."""
    header: dict[str, str]
    """Fields of every file's header."""

    def load_base(self, pretrained: Path | None = None) -> BaseModules:
        """Read the modules that carry the adapter from the base's own files, or from another folder's."""
        from lora_dag.adapters import base_modules

        model = self.model.model_copy(update={"pretrained": str(pretrained)}) if pretrained else self.model
        return base_modules.load(model, self.family, self.adapter.text_lora, self.device)

    def inject(self, modules: BaseModules) -> None:
        """Put the trained adapter on the base's modules."""
        modules.inject(self.adapter, self.weights)

    def save(self, path: Path, tensors: dict[str, torch.Tensor], fields: dict[str, str]) -> None:
        """Write a safetensors file whose header says what the file is and what it was made from."""
        from lora_dag.adapters.adapter_tensors import tensors_digest
        from lora_dag.core.tensors import save_tensors

        digest = {"modelspec.hash_sha256": f"0x{tensors_digest(tensors)}"}
        save_tensors(path, tensors, self.header | fields | digest)


@dataclass(frozen=True)
class Card:
    """What the model card knows of the exported files."""

    place: str
    """Folder of the exports, or user/name of the Hub."""
    is_repository: bool
    """Whether ``place`` is a repository of the Hub."""
    load: str
    """Lines of Python that end in ``pipe = ...``; empty where the card has shown them already."""
    pipeline: str
    """Class of the pipeline."""
    variant: str | None
    denoiser: str
    text_encoders: list[str]
    """Components of the trained text encoders."""
    name: str
    """``export.name``."""
    prompt: str
    num_inference_steps: int
    guidance_scale: float
    use_dora: bool


def load_format(name: str) -> Format:
    """The module ``lora_dag.formats.<name>``."""
    return importlib.import_module(f"{__name__}.{name}")  # type: ignore[return-value]


def known_files(formats: list[str], resized_ranks: list[int]) -> set[str]:
    """The main file of each format below the folder of the exports, where no parameter is in its name."""
    known = [name for name in formats if "{" not in load_format(name).FILE]
    adapters = [name for name in known if load_format(name).IS_ADAPTER]
    folders = [*known, *(f"resized/rank-{rank}/{name}" for rank in resized_ranks for name in adapters)]
    return {f"{folder}/{load_format(folder.rpartition('/')[2]).FILE}" for folder in folders}
