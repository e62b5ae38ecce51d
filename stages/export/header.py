"""Headers and provenance of the written files. They contain no path, user, time or git revision."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lora_dag.artifacts.adapter import FINAL, snapshot_name
from lora_dag.core.files import sha256_file
from stages.export.load_snippet import load_snippet, public_path

if TYPE_CHECKING:
    from pathlib import Path

    from stages.export.source import Source

PREDICTION = {"epsilon": "epsilon", "v_prediction": "v"}


def header_fields(source: Source) -> dict[str, str]:
    """Return the header fields of every file. The format's writer adds rank and alpha, which depend on the file.

    ``modelspec.date`` is left out, because the same inputs must give the same bytes.
    """
    base, params, config = source.base, source.params, source.adapter.lora_config
    prediction = getattr(source.family.load_scheduler(base.model).config, "prediction_type", None)
    fields = {
        "format": "pt",
        "lora_dag": json.dumps(provenance(source), sort_keys=True, ensure_ascii=False),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{source.family.MODELSPEC}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": str(params.name),
        "ss_network_module": "lycoris.kohya" if "algo" in config else "networks.lora",
        "ss_steps": str(params.step or source.adapter.num_steps),
    }
    if base.file:  # kohya's names
        fields |= {"ss_sd_model_name": base.file.name, "ss_new_sd_model_hash": base.file_sha256}
    if "algo" in config:
        fields["ss_network_args"] = json.dumps({"algo": config["algo"]})
    if prediction in PREDICTION:
        fields["modelspec.prediction_type"] = PREDICTION[prediction]
    if params.license:
        fields["modelspec.license"] = params.license
    return fields


def provenance(source: Source) -> dict[str, Any]:
    """Return the adapter and everything that determined it. For a snapshot, ``adapter`` is the final adapter."""
    base, params, adapter = source.base, source.params, source.adapter
    on_hub = base.name if base.revision else params.base_model
    return {
        "adapter": adapter.files[FINAL],
        "base": adapter.base,
        "base_name": base.name,
        "biases": adapter.biases,
        "family": base.model.family,
        "lora_config": adapter.lora_config,
        "num_steps": adapter.num_steps,
        **adapter.made_from,
        **({"step": params.step, "snapshot": adapter.files[snapshot_name(params.step)]} if params.step else {}),
        **({"text_lora": adapter.text_lora} if adapter.text_lora else {}),
        **({"base_model": on_hub} if on_hub else {}),
        **({"base_revision": base.revision} if base.revision else {}),
        **({"base_file": {"name": base.file.name, "sha256": base.file_sha256}} if base.file else {}),
    }


def export_lineage(source: Source, folder: Path, unfusable: int) -> dict[str, Any]:
    """Return the content of reports/export/lineage.json: provenance, digests and load instructions of the files.

    Args:
        unfusable: number of layers that diffusers and PEFT cannot fuse.
    """
    base, family, params = source.base, source.family, source.params
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return provenance(source) | {
        "export": params.model_dump(exclude={"push_to_hub", "step", "datasets"}),
        "files": {n: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for n, path in files.items()},
        **({"unfusable": unfusable} if unfusable else {}),
        "pipeline": {
            "class": family.PIPELINE,
            "denoiser": family.DENOISER,
            "load": load_snippet(base, family, params.base_model),
            "pretrained": public_path(base.pretrained),
            "variant": base.model.variant,
        },
    }
