"""Adapter -> files that other programs load, each loaded back by an independent reader and compared by output.

In: data/adapter, the base.  Out: data/export/{diffusers,peft,comfyui,merged}, reports/export/{metrics,lineage}.json.
Run: ``python -m stages.export [--set 'export.formats=[comfyui, merged]']``, or with ``--verify FILE`` to ask of a file
whether it is what this repository makes, and which revision makes it, or with ``--push`` to upload what was exported.
"""

from __future__ import annotations

from pathlib import Path

from stages.core.console import UserError, log, parser, run
from stages.core.params import ModelParams, RuntimeParams, load
from stages.export.params import ExportParams, refusals


def main() -> None:
    arguments = parser(__doc__, ("adapter", "export", "export_reports", "reports"))
    arguments.add_argument("--verify", type=Path, metavar="FILE", help="write nothing; say where the file comes from")
    arguments.add_argument("--push", action="store_true", help="write nothing here; upload to export.push_to_hub")
    args = arguments.parse_args()
    config = load(args.params, args.overrides)
    if args.verify:
        from stages.export.verify import verify

        verify(args.verify, config, args.adapter)
        return
    if args.push:
        from stages.export.push import push

        push(config, args.adapter, args.export, args.export_reports, args.reports)
        return
    model, params = config.section(ModelParams), config.section(ExportParams)

    from stages.artifacts import metrics
    from stages.artifacts.adapter import Adapter
    from stages.core import device
    from stages.core.base_files import digests, require_base, require_same_base
    from stages.core.files import replaced, write_json
    from stages.export.header import lineage
    from stages.export.proof import Proof
    from stages.families.base import load_family

    family = load_family(model.family)
    require_base(model, family)
    adapter = Adapter.load(args.adapter)
    require_same_base(adapter.base, digests(model, family.COMPONENTS), args.adapter)
    weights = adapter.weights(args.adapter)
    bias = adapter.lora_config.get("bias", "none") if adapter.biases else "none"
    if refused := refusals(params.formats, bias, adapter.lora_config.get("use_dora", False), family.DENOISER):
        raise UserError(*refused)
    where = device.setup(config.section(RuntimeParams), model)

    proof = Proof(model, family, params, where, adapter, weights)
    measured = {"export.effect": proof.effect, "export.megabytes": sum(t.nbytes for t in weights.values()) / 1e6}
    with replaced(args.export) as folder:
        for name in params.formats:
            proof.write(name, folder / name)
            measured |= proof.check(name, folder / name)
    metrics.save(args.export_reports / "metrics.json", measured)
    write_json(args.export_reports / "lineage.json", lineage(model, family, params, adapter, args.export))
    log.info("wrote       %s (%s)", args.export, ", ".join(params.formats))


if __name__ == "__main__":
    run(main)
