"""File formats of the stage export: one module each, with the name that ``export.formats`` uses.

To add a format, add a module that defines everything in ``Format`` below. The params class, the stage and its parity
check, the Snakefile, the model card, the report and `lora-dag push` find it by the folder's listing.
Importing a format must not import torch, because the Snakefile and the report read its constants.
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
    """Interface of a module ``lora_dag/formats/NAME.py``; the module itself is the object."""

    FILE: str
    """Main file in the format's folder. ``{name}`` in it is replaced by ``export.name``."""
    READER: str
    """Program or function that loads the file back for the parity check, for the report."""
    IS_ADAPTER: bool
    """Whether the files hold only the adapter. A whole pipeline has no copies of smaller rank."""
    LOADED_BY_PEFT: bool
    """Whether PEFT loads the adapter. PEFT cannot fuse a trained bias into a layer without a bias."""
    CAVEAT: str
    """Sentence for the model card on what the parity check does not prove; empty for none."""

    def unsupported_reason(self, adapter: AdapterKind) -> str:
        """Return why the format would lose or change a part of the adapter; empty if it can hold the adapter."""

    def write(self, export: Export, folder: Path) -> None:
        """Write the files into ``folder``, which does not exist yet. Only a whole pipeline may change the modules."""

    def load_back(self, export: Export, folder: Path) -> LoadedBack:
        """Load an adapter into the base's modules, or a whole pipeline from its files; by a third party's loader.

        Raises:
            RuntimeError: the files do not hold the exported adapter.
        """

    def usage(self, card: Card) -> str:
        """Return Markdown for the model card on how to load the files."""


@dataclass(frozen=True)
class AdapterKind:
    """Properties of an adapter that decide whether a format can hold it."""

    algo: str
    """``lora.algo``."""
    bias: str
    """``lora.bias`` if biases are trained, else none."""
    use_dora: bool
    rank: int
    """Largest rank of all layers."""
    denoiser: str
    """``unet`` or ``transformer``."""
    trains_text: bool
    """Whether text encoders are trained."""


@dataclass(frozen=True)
class LoadedBack:
    """The modules with the files loaded. The caller removes what was added to the base's modules."""

    modules: BaseModules
    unread: list[str]
    """Keys of the files that the loader ignored."""
    disable: Callable[[], object] | None
    """Function that disables the adapter; None if the files hold a whole pipeline."""


@dataclass(frozen=True)
class Export:
    """The adapter to write, and the base model to load it back into."""

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
    """Component -> adapter tensors."""
    header: dict[str, str]
    """Fields of every file's header."""
    load_modules: Callable[[], BaseModules]
    """Function that returns the base's modules in float32, without an adapter. They are loaded once for all formats."""

    def inject(self, modules: BaseModules) -> None:
        """Put the trained adapter on the base's modules."""
        modules.inject(self.adapter, self.weights)

    def save(self, path: Path, tensors: dict[str, torch.Tensor], fields: dict[str, str]) -> None:
        """Write a safetensors file. Its header names the kind of the file and its provenance."""
        from lora_dag.adapters.adapter_tensors import tensors_digest
        from lora_dag.core.tensors import save_tensors

        digest = {"modelspec.hash_sha256": f"0x{tensors_digest(tensors)}"}
        save_tensors(path, tensors, self.header | fields | digest)


@dataclass(frozen=True)
class Card:
    """Facts about the exported files for the model card."""

    source: str
    """Folder of the exports, or user/name on the Hub."""
    is_repository: bool
    """Whether ``source`` is a repository of the Hub."""
    load: str
    """Lines of Python that end in ``pipe = ...``; empty if the card already contains them."""
    pipeline: str
    """Class of the pipeline."""
    absent: list[str]
    """Components that the base declares null and the pipeline's class requires."""
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
    """Return the module ``lora_dag.formats.<name>``."""
    return importlib.import_module(f"{__name__}.{name}")  # type: ignore[return-value]


def known_files(formats: list[str], resized_ranks: list[int]) -> set[str]:
    """Return the main file of each format whose name contains no parameter, relative to the folder of the exports."""
    known = [name for name in formats if "{" not in load_format(name).FILE]
    adapters = [name for name in known if load_format(name).IS_ADAPTER]
    folders = [*known, *(f"resized/rank-{rank}/{name}" for rank in resized_ranks for name in adapters)]
    return {f"{folder}/{load_format(folder.rpartition('/')[2]).FILE}" for folder in folders}
