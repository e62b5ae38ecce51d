"""All that was measured and drawn -> one page for a reviewer, one about the dataset, and the model card.

In: reports/ of the other stages.  Out: reports/{headline.json,report.md,dataset.md,model_card.md,loss.png}
And reports/report.html, for this workspace alone: report.md in one file, with time and memory.
Run: `python -m stages.report`
"""

from __future__ import annotations

from dataclasses import replace

from lora_dag.artifacts import metrics, model_card
from lora_dag.core import params
from lora_dag.core.console import log, parser, run
from lora_dag.core.files import write_text
from lora_dag.pages import words
from stages.report import card, dataset, headline, html_page, page, same_numbers
from stages.report.inputs import read_inputs
from stages.report.params import ReportParams
from stages.report.plots import plot_losses


def main() -> None:
    paths = ["reports", "dataset_reports", "latents_reports", "train_reports", "export_reports", "export"]
    args = parser(__doc__, paths).parse_args()
    config = params.load(args.params, args.overrides)
    export, dataset_section = (config.sections[name].model_dump() for name in ("export", "dataset"))
    repo_id = export["push_to_hub"]["repo_id"] if export["push_to_hub"] else None
    inputs = read_inputs(
        args.reports, args.dataset_reports, args.latents_reports, args.train_reports, args.export_reports
    )
    inputs = replace(inputs, has_named_split=dataset_section["heldout_split"] is not None)
    caption = str(inputs.made.get("caption", ""))
    title = words.title_of(config.section(ReportParams).title, export, dataset_section["source"], caption)
    if said := words.strangers(inputs.lineage["validate"]["prompts"], [row["captions"] for row in inputs.rows]):
        log.warning("warning: %s", said)
    metrics.save(args.reports / "headline.json", headline.numbers(inputs))
    plot_losses(inputs, inputs.pictures["loss"])
    write_text(args.reports / "dataset.md", dataset.write_page(title, inputs, args.reports))
    write_text(args.reports / "report.md", page.write_page(title, inputs, args.reports))
    place = card.Place(repo_id or args.export.as_posix(), is_repository=repo_id is not None)
    mark = model_card.mark(args.reports, args.export_reports, title, repo_id)
    write_text(args.reports / model_card.NAME, card.write_card(title, place, inputs, args.reports) + f"\n{mark}\n")
    own = html_page.write_page(title, inputs, args.reports, args.train_reports, args.export_reports)
    write_text(args.reports / "report.html", own)
    log.info("verdict     %s", page.headline(inputs))
    written = ("headline.json", "report.md", "report.html", "dataset.md", model_card.NAME, "loss.png")
    log.info("wrote       %s", ", ".join(str(args.reports / name) for name in written))
    if said := same_numbers.line(inputs, args.reports):
        log.info(said)


if __name__ == "__main__":
    run(main, kept="no page is half-written")
