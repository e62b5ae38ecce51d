"""The lines of Python that load a base, for whoever has nothing but diffusers."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_dag.bases.resolve import Base
    from lora_dag.families.protocol import Family


def load_snippet(base: Base, family: Family, base_model: str | None) -> str:
    """Ends in ``pipe = ...``.

    Args:
        base_model: the base's repository on the Hub, as ``export.base_model`` says.
    """
    left_out = "".join(f", {name}=None" for name in family.left_out(base.model))
    variant = f", variant={quoted(base.model.variant)}" if base.model.variant else ""
    if base.file:
        return single_file_snippet(base, base.file, family, left_out, variant)
    pretrained, pinned = base_model or public_path(base.pretrained), ""
    if base.revision:
        pretrained, pinned = base.name, f", revision={quoted(base.revision)}"
    return f"pipe = {family.PIPELINE}.from_pretrained({quoted(pretrained)}{pinned}{variant}{left_out})"


def single_file_snippet(base: Base, file: Path, family: Family, left_out: str, variant: str) -> str:
    """Components that the file does not hold are passed: ``from_single_file`` does not look for them."""
    folder, lines = quoted(public_path(base.pretrained)), []
    for name, cls in family.COMPONENTS.items():
        if name not in base.inside and (Path(base.model.pretrained) / name / "config.json").exists():
            library = "diffusers" if name == "vae" else "transformers"
            lines.append(f"from {library} import {cls}")
            lines.append(f"{name} = {cls}.from_pretrained({folder}, subfolder={quoted(name)}{variant})")
            left_out += f", {name}={name}"
    where = quoted(f"{public_path(base.pretrained)}/{file.name}")
    return "\n".join([*lines, f"pipe = {family.PIPELINE}.from_single_file({where}, config={folder}{left_out})"])


def public_path(pretrained: str) -> str:
    """A folder as others may see it: an absolute path is its last part."""
    path = PurePath(pretrained)
    return path.name if path.is_absolute() else path.as_posix()


def quoted(text: str) -> str:
    """JSON strings are Python ones too, whatever colons and quotes are in them."""
    return json.dumps(text, ensure_ascii=False)
