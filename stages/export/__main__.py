"""Adapter -> files that other programs load, each loaded back by an independent reader and compared by output.

In: data/adapter, the base.  Out: data/export/{diffusers,peft,comfyui,merged,resized}, reports/export.
Run: ``python -m stages.export [--set 'export.formats=[comfyui, merged]']``
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lora_dag.core.console import UserError, log, parser, run
from lora_dag.core.params import Config, ModelParams, RuntimeParams, load
from stages.export.params import ExportParams, rank_refusals, refusals, step_refusals

if TYPE_CHECKING:
    from lora_dag.artifacts.metrics import Value
    from stages.export.proof import Proof


def main() -> None:
    args = parser(__doc__, ("adapter", "export", "export_reports")).parse_args()
    config = load(args.params, args.overrides)
    model, params = config.section(ModelParams), config.section(ExportParams)

    from lora_dag.artifacts import lineage, metrics
    from lora_dag.artifacts.adapter import Adapter
    from lora_dag.bases import resolve
    from lora_dag.bases.layout import digests, require_same_base
    from lora_dag.core import device
    from lora_dag.core.files import replaced, write_text
    from lora_dag.core.progress import Bar
    from lora_dag.core.took import Work
    from lora_dag.families.protocol import load_family
    from stages.export import resize
    from stages.export.header import provenance
    from stages.export.proof import Proof

    family = load_family(model.family)
    base = resolve.resolve(model, family)
    adapter = Adapter.load(args.adapter)
    require_same_base(adapter.base, digests(base.model, family.COMPONENTS), args.adapter)
    bias = adapter.lora_config.get("bias", "none") if adapter.biases else "none"
    params = params.with_words(source_of(config), str(adapter.made_from.get("caption", "")))
    lora = adapter.lora_config
    algo, text = lora.get("algo", "lora"), bool(adapter.text_lora)
    refused = refusals(params.formats, algo, bias, lora.get("use_dora", False), family.DENOISER, text)
    refused += rank_refusals(params.resized_ranks, algo, lora["r"], lora.get("rank_pattern", {}), text)
    refused += step_refusals(params.step, adapter.snapshots, adapter.num_steps)
    if refused:
        raise UserError(*refused)
    if params.step == adapter.num_steps:
        params = params.model_copy(update={"step": None})
    weights = adapter.weights(args.adapter, params.step)
    if params.step:
        log.info("snapshot    of step %d of %d", params.step, adapter.num_steps)
    where = device.setup(config.section(RuntimeParams), model)

    num_steps = 1 + 2 * len(params.formats) + len(params.resized_ranks) * (1 + 2 * len(params.resizable))
    speed = device.speed_conditions(where, model, adapter.base[family.DENOISER])
    work = Work("export", speed | {"formats": params.formats, "resized_ranks": params.resized_ranks}, num_steps)
    work.announce()
    with replaced(args.export) as folder, Bar("export", num_steps) as bar:
        proof = Proof(base, family, params, where, adapter, weights)
        bar.add()
        svd = resize.factors(proof.parts[family.DENOISER]) if algo == "lora" else {}
        measured: dict[str, Value] = {
            "export.effect": proof.effect,
            "export.megabytes": sum(t.nbytes for t in weights.values()) / 1e6,
        }
        for name in params.formats:
            proof.write(name, folder / name)
            bar.add()
            measured |= proof.check(name, folder / name)
            bar.add()
        for rank in params.resized_ranks:
            log.info("rank %-6d keeping the largest singular values", rank)
            copy = Proof(base, family, params, where, *resize.resized(adapter, weights, svd, rank))
            bar.add()
            for name in params.resizable:
                copy.write(name, folder / "resized" / f"rank-{rank}" / name)
                bar.add()
                copy.check(name, folder / "resized" / f"rank-{rank}" / name)
                bar.add()
            measured |= compared(proof, copy, rank, [layer.energy(rank) for layer in svd.values()])
    write_text(args.export_reports / "energy.csv", resize.energy_csv(svd, params.resized_ranks))
    metrics.save(args.export_reports / "metrics.json", measured)
    unfusable = len(proof.parts[family.DENOISER].unfusable) if {"diffusers", "peft"} & set(params.formats) else 0
    made = provenance(base, family, params, adapter, args.export, unfusable)
    lineage.save(args.export_reports / "lineage.json", made)
    work.record(bar.done, time.monotonic() - bar.began)
    if unfusable:
        log.warning(
            "warning: %d adapted %s no bias: `pipe.fuse_lora()` and PEFT's `merge_and_unload()` raise an error; use "
            "the files unfused, or the format merged",
            unfusable,
            "layer has" if unfusable == 1 else "layers have",
        )
    log.info("wrote       %s (%s)", args.export, ", ".join(params.formats))


def source_of(config: Config) -> str:
    """Of section dataset, whose class is no code of this stage."""
    return str(config.sections["dataset"].model_dump()["source"])


def compared(proof: Proof, copy: Proof, rank: int, energies: list[float]) -> dict[str, Value]:
    """How near a copy of a smaller rank comes to the trained adapter: recorded, no gate."""
    error = float((copy.expected - proof.expected).abs().max())
    mean, least = sum(energies) / len(energies), min(energies)
    log.info("rank %-6d keeps %.4f of the energy (least %.4f)", rank, mean, least)
    log.info("rank %-6d largest difference of the output %.2g, of an effect of %.2g", rank, error, proof.effect)
    found = {"energy_mean": mean, "energy_min": least, "max_abs_error": error, "relative_error": error / proof.effect}
    return {f"export.rank_{rank}.{name}": value for name, value in found.items()}


if __name__ == "__main__":
    run(main, kept="the folder of an earlier export is as it was")
