"""Write the page for a reviewer, the page about the dataset, and the model card.

In: reports/ of the other stages.  Out: reports/{headline.json,report.md,dataset.md,model_card.md,loss.png}
And reports/report.html, which git ignores: report.md as one HTML file, with time and memory of this machine.
Run: `python -m stages.report`
"""

from __future__ import annotations

from dataclasses import replace

from lora_dag.artifacts import metrics, model_card
from lora_dag.core import params
from lora_dag.core.console import log, parser, run, warn
from lora_dag.core.files import write_text
from lora_dag.core.stage_start import log_stage_start
from lora_dag.pages import default_texts
from stages.report import card, dataset, headline, html_page, page, reproduced_numbers
from stages.report.inputs import read_inputs
from stages.report.params import ReportParams
from stages.report.plots import plot_losses


def main() -> None:
    paths = ["reports", "dataset_reports", "latents_reports", "train_reports", "export_reports", "export"]
    args = parser(__doc__, paths).parse_args()
    config = params.load(args.params, args.overrides)
    log_stage_start("report", config, args)
    export, dataset_section = (config.sections[name].model_dump() for name in ("export", "dataset"))
    repo_id = export["push_to_hub"]["repo_id"] if export["push_to_hub"] else None
    inputs = read_inputs(
        args.reports, args.dataset_reports, args.latents_reports, args.train_reports, args.export_reports
    )
    inputs = replace(inputs, has_named_split=dataset_section["heldout_split"] is not None)
    caption = str(inputs.made.get("caption", ""))
    title = default_texts.page_title(config.section(ReportParams).title, export, dataset_section["source"], caption)
    captions = [row["captions"] for row in inputs.rows]
    if unrelated := default_texts.unrelated_prompts(inputs.lineage["validate"]["prompts"], captions):
        warn(unrelated.code, unrelated.at(config.sections["validate"].setting("prompts")))
    metrics.save(args.reports / "headline.json", headline.numbers(inputs))
    plot_losses(inputs, inputs.images["loss"])
    write_text(args.reports / "dataset.md", dataset.write_page(title, inputs, args.reports))
    write_text(args.reports / "report.md", page.write_page(title, inputs, args.reports))
    location = card.Location(repo_id or args.export.as_posix(), is_repository=repo_id is not None)
    fingerprint = model_card.fingerprint(args.reports, args.export_reports, title, repo_id)
    write_text(
        args.reports / model_card.NAME, card.write_card(title, location, inputs, args.reports) + f"\n{fingerprint}\n"
    )
    html = html_page.write_page(title, inputs, args.reports, args.train_reports, args.export_reports)
    write_text(args.reports / "report.html", html)
    log.info("verdict     %s", page.headline(inputs))
    written = ("headline.json", "report.md", "report.html", "dataset.md", model_card.NAME, "loss.png")
    log.info("wrote       %s", ", ".join(str(args.reports / name) for name in written))
    if note := reproduced_numbers.difference_line(inputs, args.reports):
        log.info(note)


if __name__ == "__main__":
    run(main, kept="no page is half-written")
