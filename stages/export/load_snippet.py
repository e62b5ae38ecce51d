"""Lines of Python that load a base model with stock diffusers."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_dag.bases.resolve import Base
    from lora_dag.families.protocol import Family


def load_snippet(base: Base, family: Family, base_model: str | None) -> str:
    """Return the lines that load the base, ending in ``pipe = ...``.

    Args:
        base_model: ``export.base_model``, the base's repository on the Hub.
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
    """Return the lines for a checkpoint in one file. ``from_single_file`` needs components that are not in the file."""
    folder, lines = quoted(public_path(base.pretrained)), []
    for name, cls in family.COMPONENTS.items():
        if name not in base.components_in_file and (Path(base.model.pretrained) / name / "config.json").exists():
            library = "diffusers" if name == "vae" else "transformers"
            lines.append(f"from {library} import {cls}")
            lines.append(f"{name} = {cls}.from_pretrained({folder}, subfolder={quoted(name)}{variant})")
            left_out += f", {name}={name}"
    path = quoted(f"{public_path(base.pretrained)}/{file.name}")
    return "\n".join([*lines, f"pipe = {family.PIPELINE}.from_single_file({path}, config={folder}{left_out})"])


def public_path(pretrained: str) -> str:
    """Return a folder without private parts: only the last part of an absolute path."""
    path = PurePath(pretrained)
    return path.name if path.is_absolute() else path.as_posix()


def quoted(text: str) -> str:
    """Return a Python string literal. Every JSON string is one."""
    return json.dumps(text, ensure_ascii=False)
