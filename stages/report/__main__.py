"""All that was measured and drawn -> one page for a reviewer, and one about the dataset.

In: reports/ of the other stages.  Out: reports/{report.md,dataset.md,loss.png}
Run: `python -m stages.report`
"""

from __future__ import annotations

from stages.core import params
from stages.core.console import log, parser, run
from stages.core.files import write_text
from stages.report import dataset, page
from stages.report.inputs import read_inputs
from stages.report.params import ReportParams
from stages.report.plots import plot_losses


def main() -> None:
    paths = ["reports", "dataset_reports", "latents_reports", "train_reports", "export_reports"]
    args = parser(__doc__, paths).parse_args()
    title = params.load(args.params, args.overrides).section(ReportParams).title
    inputs = read_inputs(
        args.reports, args.dataset_reports, args.latents_reports, args.train_reports, args.export_reports
    )
    plot_losses(inputs, inputs.pictures["loss"])
    write_text(args.reports / "dataset.md", dataset.write_page(title, inputs, args.reports))
    write_text(args.reports / "report.md", page.write_page(title, inputs, args.reports))
    log.info("verdict     %s", page.headline(inputs))
    log.info("wrote       %s", ", ".join(str(args.reports / name) for name in ("report.md", "dataset.md", "loss.png")))


if __name__ == "__main__":
    run(main)
