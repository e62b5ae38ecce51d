"""Export the adapter to files for other programs. Each file is loaded back by an independent reader and compared.

In: data/adapter, the base.  Out: data/export/FORMAT, data/export/resized, reports/export.
Run: ``python -m stages.export [--set 'export.formats=[comfyui, merged]']``
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lora_dag.core.console import log, parser, plural, run, warn
from lora_dag.core.params import ModelParams, RuntimeParams, load
from lora_dag.core.stage_start import log_stage_start

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_dag.artifacts.metrics import Value
    from lora_dag.core.progress import Bar
    from stages.export.params import ExportParams, Format
    from stages.export.parity import ParityCheck
    from stages.export.resize import Factors


def main() -> None:
    args = parser(__doc__, ("adapter", "export", "export_reports")).parse_args()
    config = load(args.params, args.overrides)
    log_stage_start("export", config, args)

    from lora_dag.artifacts import lineage, metrics
    from lora_dag.core import device as devices
    from lora_dag.core.files import replaced, write_text
    from lora_dag.core.progress import Bar, elapsed
    from lora_dag.core.time_estimate import Work
    from stages.export import resize
    from stages.export.header import export_lineage
    from stages.export.parity import ParityCheck, ProofBase
    from stages.export.source import read_source

    source = read_source(config, args.adapter)
    model, params, denoiser = config.section(ModelParams), source.params, source.family.DENOISER
    device = devices.setup(config.section(RuntimeParams), model)
    speed = devices.speed_conditions(device, model, source.adapter.base[denoiser])
    files = {"formats": params.formats, "resized_ranks": params.resized_ranks}
    work = Work("export", speed | files, num_steps(params))
    work.announce()
    log.info("memory      %.2g GB for %s", source.gigabytes, " and ".join([denoiser, *source.adapter.text_lora]))
    with replaced(args.export) as folder, Bar("export", num_steps(params)) as bar:
        base = ProofBase(source, device)
        parity = ParityCheck(source, base)
        bar.add()
        measured: dict[str, Value] = {"export.effect": parity.effect, "export.megabytes": source.megabytes}
        for name in params.adapter_formats:
            measured |= write_and_check(parity, name, folder / name, bar)
        svd = resize.factors(parity.export.tensors[denoiser]) if "algo" not in source.adapter.lora_config else {}
        for rank in params.resized_ranks:
            measured |= write_resized(parity, svd, rank, folder / "resized" / f"rank-{rank}", bar)
        base.require_unchanged()
        for name in params.pipeline_formats:  # they change the base's modules
            measured |= write_and_check(parity, name, folder / name, bar)
        if model.quantization:
            measured |= check_on_quantized_base(parity, folder)
    write_text(args.export_reports / "energy.csv", resize.energy_csv(svd, params.resized_ranks))
    metrics.save(args.export_reports / "metrics.json", measured)
    unfusable = parity.num_unfusable(params.formats)
    with elapsed("hash", "the written files"):
        record = export_lineage(source, args.export, unfusable)
    lineage.save(args.export_reports / "lineage.json", record)
    work.record(bar.done, time.monotonic() - bar.began)
    warn_of_fusing(unfusable)
    log.info("wrote       %s (%s)", args.export, ", ".join(params.formats))


def num_steps(params: ExportParams) -> int:
    """Return the steps of the progress bar: two per file, and one per adapter whose output is computed."""
    return 1 + 2 * len(params.formats) + len(params.resized_ranks) * (1 + 2 * len(params.adapter_formats))


def write_and_check(parity: ParityCheck, name: Format, folder: Path, bar: Bar) -> dict[str, float]:
    """Write a format, load it back and compare the output."""
    parity.write(name, folder)
    bar.add()
    measured = parity.check(name, folder)
    bar.add()
    return measured


def check_on_quantized_base(parity: ParityCheck, folder: Path) -> dict[str, float]:
    """Compare the files that PEFT loads on the quantized base too, and return the errors."""
    from lora_dag.formats import load_format

    quantized = parity.on_quantized_base()
    log.info("quantized   %s: the same files on the quantized base", parity.source.base.model.quantization)
    measured = {"export.quantization_error": float((quantized.adapter_output - parity.adapter_output).abs().max())}
    for name in parity.source.params.adapter_formats:
        if load_format(name).LOADED_BY_PEFT:
            key = f"export.{name}.max_abs_error"
            measured[f"{key}_quantized"] = quantized.check(name, folder / name)[key]
    return measured


def write_resized(
    parity: ParityCheck, svd: Mapping[str, Factors], rank: int, folder: Path, bar: Bar
) -> dict[str, Value]:
    """Write copies of the adapter at a smaller rank, check each, and compare them with the trained adapter."""
    from stages.export import resize
    from stages.export.parity import ParityCheck

    log.info("%-11s keeping the largest singular values", f"rank {rank}")
    copy = ParityCheck(resize.resized(parity.source, svd, rank), parity.base)
    bar.add()
    for name in parity.source.params.adapter_formats:
        write_and_check(copy, name, folder / name, bar)
    return resized_metrics(parity, copy, rank, [layer.energy(rank) for layer in svd.values()])


def resized_metrics(parity: ParityCheck, copy: ParityCheck, rank: int, energies: list[float]) -> dict[str, Value]:
    """Return how much a copy of smaller rank differs from the trained adapter. There is no limit."""
    error = float((copy.adapter_output - parity.adapter_output).abs().max())
    mean, least = sum(energies) / len(energies), min(energies)
    log.info("%-11s keeps %.4f of the energy (lowest layer %.4f)", f"rank {rank}", mean, least)
    log.info(
        "%-11s largest difference of the output %.2g, the adapter's effect is %.2g",
        f"rank {rank}",
        error,
        parity.effect,
    )
    measured = {
        "energy_mean": mean,
        "energy_min": least,
        "max_abs_error": error,
        "relative_error": error / parity.effect,
    }
    return {f"export.rank_{rank}.{name}": value for name, value in measured.items()}


def warn_of_fusing(num_layers: int) -> None:
    """Warn if diffusers and PEFT cannot fuse the exported adapter."""
    if num_layers:
        warn(
            "cannot-fuse",
            f"{plural(num_layers, 'layer has', 'layers have')} a trained bias but no bias in the base, so "
            "`pipe.fuse_lora()` and PEFT's `merge_and_unload()` fail. Use the files unfused, or the format merged.",
        )


if __name__ == "__main__":
    run(main, kept="an earlier export is unchanged")
