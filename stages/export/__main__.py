"""Adapter -> files that other programs load, each loaded back by an independent reader and compared by output.

In: data/adapter, the base.  Out: data/export/{diffusers,peft,comfyui,merged,README.md}, reports/export/metrics.json.
Run: ``python -m stages.export [--set 'export.formats=[comfyui, merged]']``, or with ``--verify FILE`` to ask of a file
whether it is what this repository makes, and which revision makes it.
"""

from __future__ import annotations

from pathlib import Path

from stages.core.console import UserError, log, parser, run
from stages.core.params import ModelParams, RuntimeParams, load
from stages.export.params import ExportParams, refusals


def main() -> None:
    arguments = parser(__doc__, ("adapter", "export", "export_reports"))
    arguments.add_argument("--verify", type=Path, metavar="FILE", help="write nothing; say where the file comes from")
    args = arguments.parse_args()
    config = load(args.params, args.overrides)
    if args.verify:
        from stages.export.verify import verify

        verify(args.verify, config, args.adapter)
        return
    model, params = config.section(ModelParams), config.section(ExportParams)

    from stages.artifacts import metrics
    from stages.artifacts.adapter import Adapter
    from stages.core import device
    from stages.core.base_files import digests, require_base, require_same_base
    from stages.core.files import replaced, write_text
    from stages.export.card import model_card
    from stages.export.proof import Proof
    from stages.families.base import load_family

    family = load_family(model.family)
    require_base(model, family)
    adapter = Adapter.load(args.adapter)
    require_same_base(adapter.base, digests(model, family.COMPONENTS), args.adapter)
    weights = adapter.weights(args.adapter)
    bias = adapter.lora_config.get("bias", "none") if adapter.biases else "none"
    use_dora = adapter.lora_config.get("use_dora", False)
    if refused := refusals(params.formats, bias, use_dora, family.DENOISER, bool(adapter.text_lora)):
        raise UserError(*refused)
    where = device.setup(config.section(RuntimeParams), model)

    proof = Proof(model, family, params, where, adapter, weights)
    measured = {"export.effect": proof.effect, "export.megabytes": sum(t.nbytes for t in weights.values()) / 1e6}
    with replaced(args.export) as folder:
        for name in params.formats:
            proof.write(name, folder / name)
            measured |= proof.check(name, folder / name)
        write_text(folder / "README.md", model_card(model, family, params, adapter))
    metrics.save(args.export_reports / "metrics.json", measured)
    log.info("wrote       %s (%s, README.md)", args.export, ", ".join(params.formats))


if __name__ == "__main__":
    run(main)
