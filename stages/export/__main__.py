"""Adapter -> files that other programs load, each loaded back by an independent reader and compared by output.

In: data/adapter, the base.  Out: data/export/{diffusers,peft,comfyui,merged,resized}, reports/export.
Run: ``python -m stages.export [--set 'export.formats=[comfyui, merged]']``
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lora_dag.core.console import UserError, log, parser, run
from lora_dag.core.params import Config, ModelParams, RuntimeParams, load
from lora_dag.formats import AdapterKind
from stages.export.params import ExportParams, format_refusals, rank_refusals, step_refusals

if TYPE_CHECKING:
    from pathlib import Path

    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.artifacts.metrics import Value
    from lora_dag.core.progress import Bar
    from stages.export.params import Format
    from stages.export.parity import ParityCheck


def main() -> None:
    args = parser(__doc__, ("adapter", "export", "export_reports")).parse_args()
    config = load(args.params, args.overrides)
    model, params = config.section(ModelParams), config.section(ExportParams)

    from lora_dag.artifacts import lineage, metrics
    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.bases import resolve
    from lora_dag.bases.layout import digests, require_same_base
    from lora_dag.core import device as devices
    from lora_dag.core.files import replaced, write_text
    from lora_dag.core.progress import Bar
    from lora_dag.core.took import Work
    from lora_dag.families.protocol import load_family
    from stages.export import resize
    from stages.export.header import provenance
    from stages.export.parity import ParityCheck

    family = load_family(model.family)
    base = resolve.resolve(model, family)
    adapter = Adapter.load(args.adapter)
    require_same_base(adapter.base, digests(base.model, family.COMPONENTS), args.adapter)
    require_possible(params, adapter, family.DENOISER)
    params = params.with_words(source_of(config), str(adapter.made_from.get("caption", "")))
    if params.step == adapter.num_steps:
        params = params.model_copy(update={"step": None})
    weights = adapter.weights(args.adapter, params.step)
    if params.step:
        log.info("snapshot    of step %d of %d", params.step, adapter.num_steps)
    device = devices.setup(config.section(RuntimeParams), model)

    num_steps = 1 + 2 * len(params.formats) + len(params.resized_ranks) * (1 + 2 * len(params.resizable))
    speed = devices.speed_conditions(device, model, adapter.base[family.DENOISER])
    work = Work("export", speed | {"formats": params.formats, "resized_ranks": params.resized_ranks}, num_steps)
    work.announce()
    with replaced(args.export) as folder, Bar("export", num_steps) as bar:
        parity = ParityCheck(base, family, params, device, adapter, weights)
        bar.add()
        measured: dict[str, Value] = {
            "export.effect": parity.effect,
            "export.megabytes": sum(t.nbytes for t in weights.values()) / 1e6,
        }
        for name in params.formats:
            measured |= write_and_check(parity, name, folder / name, bar)
        svd = resize.factors(parity.export.tensors[family.DENOISER]) if "algo" not in adapter.lora_config else {}
        for rank in params.resized_ranks:
            log.info("rank %-6d keeping the largest singular values", rank)
            copy = ParityCheck(base, family, params, device, *resize.resized(adapter, weights, svd, rank))
            bar.add()
            for name in params.resizable:
                write_and_check(copy, name, folder / "resized" / f"rank-{rank}" / name, bar)
            measured |= compared(parity, copy, rank, [layer.energy(rank) for layer in svd.values()])
    write_text(args.export_reports / "energy.csv", resize.energy_csv(svd, params.resized_ranks))
    metrics.save(args.export_reports / "metrics.json", measured)
    unfusable = parity.num_unfusable(params.formats)
    made = provenance(base, family, params, adapter, args.export, unfusable)
    lineage.save(args.export_reports / "lineage.json", made)
    work.record(bar.done, time.monotonic() - bar.began)
    warn_of_fusing(unfusable)
    log.info("wrote       %s (%s)", args.export, ", ".join(params.formats))


def require_possible(params: ExportParams, adapter: Adapter, denoiser: str) -> None:
    """Raises UserError with a line for each format, rank or step that this adapter has not."""
    lora = adapter.lora_config
    kind = AdapterKind(
        algo=lora.get("algo", "lora"),
        bias=lora.get("bias", "none") if adapter.biases else "none",
        use_dora=lora.get("use_dora", False),
        rank=max([lora["r"], *lora.get("rank_pattern", {}).values()]),
        denoiser=denoiser,
        trains_text=bool(adapter.text_lora),
    )
    found = format_refusals(params.formats, kind) + rank_refusals(params.resized_ranks, kind)
    found += step_refusals(params.step, adapter.snapshots, adapter.num_steps)
    if found:
        raise UserError(*found)


def source_of(config: Config) -> str:
    """Of section dataset, whose class is no code of this stage."""
    return str(config.sections["dataset"].model_dump()["source"])


def write_and_check(parity: ParityCheck, name: Format, folder: Path, bar: Bar) -> dict[str, float]:
    """Write a format and compare what it loads back as; two steps of the bar."""
    parity.write(name, folder)
    bar.add()
    measured = parity.check(name, folder)
    bar.add()
    return measured


def compared(parity: ParityCheck, copy: ParityCheck, rank: int, energies: list[float]) -> dict[str, Value]:
    """How near a copy of a smaller rank comes to the trained adapter: recorded, no gate."""
    error = float((copy.adapter_output - parity.adapter_output).abs().max())
    mean, least = sum(energies) / len(energies), min(energies)
    log.info("rank %-6d keeps %.4f of the energy (least %.4f)", rank, mean, least)
    log.info("rank %-6d largest difference of the output %.2g, of an effect of %.2g", rank, error, parity.effect)
    found = {"energy_mean": mean, "energy_min": least, "max_abs_error": error, "relative_error": error / parity.effect}
    return {f"export.rank_{rank}.{name}": value for name, value in found.items()}


def warn_of_fusing(num_layers: int) -> None:
    if num_layers:
        log.warning(
            "warning: %d adapted %s no bias: `pipe.fuse_lora()` and PEFT's `merge_and_unload()` raise an error; use "
            "the files unfused, or the format merged",
            num_layers,
            "layer has" if num_layers == 1 else "layers have",
        )


if __name__ == "__main__":
    run(main, kept="the folder of an earlier export is as it was")
