"""Two revisions side by side: what was set differently, what came of it, and whether the held-out pictures can tell.

In: params.yaml and reports/ of two revisions (commit, branch, tag, DVC experiment, or the workspace).
Out: compare/A..B/compare.md, samples.png and, where the datasets differ, dataset.png; and the page on the terminal.
Run: `python -m stages.compare [A] [B]`, such as `python -m stages.compare main brave-owl`
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from stages.artifacts import picture_table
from stages.core import evaluation
from stages.core.console import UserError, log, run
from stages.core.dataset_changes import Changes, compare_tables
from stages.core.evaluation import Estimate, Score
from stages.core.files import write_text
from stages.core.git import git
from stages.core.markdown import interval, signed, table

if TYPE_CHECKING:
    from PIL import Image

WORKSPACE = "workspace"
SHEET_BYTES = 300_000
REPORTS = ("reports/metrics.json", "reports/train/metrics.json", "reports/export/metrics.json")
PICTURE_TABLE = "reports/dataset/pictures.csv"
SAMPLING = ("num_inference_steps", "guidance_scale", "negative_prompt", "seed")  # of section validate
IGNORED_SECTIONS = ("runtime", "report", "sweep")  # they change no result
PICTURES, LATENTS = "pictures and captions", "latents and prompt embeddings"
NAME_THE_BASE = ("model.family", "model.pretrained", "model.variant")
MOVE_LATENTS = ("model.", "dataset.", "cache.")
LOWER_IS_BETTER = re.compile(r"\.(loss|loss_change|loss_(low|mid|high)_noise|train_loss|overfit_gap|loss_final)$")
HIDDEN = re.compile(r"(_low|_high|_base)$")  # a metric's interval and the base's values


@dataclass(frozen=True)
class Side:
    """One revision's settings and reports."""

    name: str
    params: dict[str, Any]
    """Dotted key -> value."""
    metrics: dict[str, Any]
    scores: list[Score]
    lineage: dict[str, Any]
    samples: bytes
    """reports/samples.png"""
    pictures: list[picture_table.Row] | None
    """reports/dataset/pictures.csv; None for a revision from before there was one"""

    @property
    def prompts(self) -> list[str]:
        return self.lineage["validate"]["prompts"]


def main() -> None:
    args = arguments().parse_args()
    a, b = read_side(args.a), read_side(args.b)
    page, changes = write_page(a, b), changed_pictures(a, b)
    out = args.out / f"{folder_name(a.name)}..{folder_name(b.name)}"
    drawn = draw_thumbnails(changes, out / "dataset.png") + draw_sheet(a, b, out / "samples.png")
    write_text(out / "compare.md", page + drawn)
    log.info("%s", page)
    log.info("wrote       %s", out)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", nargs="?", default="HEAD", metavar="A", help="(default: HEAD)")
    parser.add_argument("b", nargs="?", default=WORKSPACE, metavar="B", help="(default: the workspace)")
    parser.add_argument("--out", type=Path, default=Path("compare"), metavar="DIR", help="(default: compare)")
    return parser


def folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


# Reading a revision


def read_side(name: str) -> Side:
    """Settings and reports of a revision, or of the files in the workspace.

    Raises:
        UserError: no such revision, or it has no reports.
    """
    commit = None if name == WORKSPACE else resolve(name)

    def find(path: str) -> bytes | None:
        return read_workspace(path) if commit is None else read_commit(commit, path)

    def read(path: str) -> bytes:
        found = find(path)
        if found is None:
            raise UserError(f"{name}: has no {path}; {how_to_report(commit)}")
        return found

    optional = [find(path) for path in REPORTS[1:]]
    measured = [read(REPORTS[0]), *(blob for blob in optional if blob is not None)]
    table = find(PICTURE_TABLE)
    return Side(
        name=name,
        params=flatten(YAML(typ="safe", pure=True).load(read("params.yaml"))),
        metrics={key: value for blob in measured for key, value in json.loads(blob).items()},
        scores=evaluation.read_scores(read("reports/validate/heldout.csv").decode()),
        lineage=json.loads(read("reports/validate/lineage.json")),
        samples=read("reports/samples.png"),
        pictures=None if table is None else read_pictures(name, table),
    )


def read_pictures(name: str, table: bytes) -> list[picture_table.Row]:
    try:
        return picture_table.parse(table.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{name}: {PICTURE_TABLE} is damaged ({error}); run `dvc repro` there") from None


def how_to_report(commit: str | None) -> str:
    return "run `dvc repro` first" if commit is None else "run `dvc repro` there and commit reports/"


def read_workspace(path: str) -> bytes | None:
    return Path(path).read_bytes() if Path(path).is_file() else None


def read_commit(commit: str, path: str) -> bytes | None:
    """A file of a commit; paths are relative to the current folder."""
    return git("show", f"{commit}:./{path}")


def resolve(name: str) -> str:
    """Commit of a branch, tag, hash or DVC experiment.

    Raises:
        UserError: nothing of that name; the nearest names are given. Or several experiments have it.
    """
    if shutil.which("git") is None:
        raise UserError("git: not found on PATH; install it")
    if git("rev-parse", "--git-dir") is None:
        raise UserError("compare: this folder is in no git repository; run it from a clone's root")
    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if commit:
        return commit.decode().strip()
    experiments = list_experiments()
    found = {baseline: commit for (baseline, experiment), commit in experiments.items() if experiment == name}
    if not found:
        raise unknown_revision(name, (experiment for _, experiment in experiments))
    if len(found) == 1:
        return next(iter(found.values()))
    head = (git("rev-parse", "HEAD") or b"").decode().strip()
    if head not in found:
        listed = ", ".join(sorted(commit[:7] for commit in found.values()))
        raise UserError(f"{name}: experiments of {len(found)} commits have this name; name one by its hash: {listed}")
    return found[head]


def list_experiments() -> dict[tuple[str, str], str]:
    """(baseline commit, experiment name) -> commit; DVC keeps them as refs/exps/<2 digits>/<38 digits>/<name>."""
    lines = (git("for-each-ref", "--format=%(refname) %(objectname)", "refs/exps") or b"").decode().splitlines()
    found = {}
    for line in lines:
        match = re.fullmatch(r"refs/exps/([0-9a-f]{2})/([0-9a-f]{38})/(\S+) (\w+)", line)
        if match:
            found[match[1] + match[2], match[3]] = match[4]
    return found


def unknown_revision(name: str, experiments: Iterable[str]) -> UserError:
    refs = git("for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags", "refs/remotes") or b""
    known = sorted({*refs.decode().split(), *experiments, WORKSPACE})
    near = difflib.get_close_matches(name, known, n=3) or known[:5]
    return UserError(f"{name}: no commit, branch, tag or DVC experiment of that name (near: {', '.join(near)})")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


# The page


def write_page(a: Side, b: Side) -> str:
    """Markdown: verdict, parameters and inputs that differ, metrics, and what was done to the dataset."""
    paired, changes = paired_difference(a, b), changed_pictures(a, b)
    sections = [
        f"# {a.name} and {b.name}",
        f"**{verdict(a, b, paired)}{caveat(a, b) if paired else ''}**",
        "## What differs",
        differences(a, b),
        "## Metrics",
        metrics_table(a, b, paired),
        *(["## Dataset", f"From {a.name} to {b.name}: {changes.summary()}.", changes.markdown()] if changes else []),
    ]
    return "\n\n".join(sections) + "\n"


def paired_difference(a: Side, b: Side) -> Estimate | None:
    """B's adapter loss minus A's per held-out picture, with its interval; None where the tables differ."""
    if a.metrics["val.table"] != b.metrics["val.table"]:
        return None
    rows = zip(a.scores, b.scores, strict=True)  # by position: equal tables have equal rows, whatever the files' names
    differences = evaluation.by_picture((t.file_name, t.adapter - s.adapter) for s, t in rows if t.split == "heldout")
    return evaluation.estimate(differences, seed=0)


def verdict(a: Side, b: Side, paired: Estimate | None) -> str:
    """What the held-out pictures say, and no more."""
    if paired is None:
        return (
            "No verdict: the tables of held-out rows differ (pictures, captions, timesteps or noise), so the losses "
            "are not paired. Run both with the same dataset and validate sections."
        )
    bounds = f"95 % interval of the paired difference {interval(paired.low, paired.high)}"
    better, worse = (b, a) if paired.mean < 0 else (a, b)
    if paired.low != paired.low:
        return f"The loss differs by {signed(paired.mean)} on one held-out picture, which cannot tell more."
    if paired.low == paired.high == 0:
        return "The held-out losses are the same to the last digit."
    if paired.low <= 0 <= paired.high:
        return f"No difference that the held-out pictures can show: {signed(paired.mean)}, {bounds}."
    left, right = names(better, worse)
    return f"{left} is better than {right}: held-out loss lower by {abs(paired.mean):.4f}, {bounds}."


def caveat(a: Side, b: Side) -> str:
    """Said behind a verdict that parameters alone do not account for."""
    inputs = unexplained(a, b)
    return f" More than parameters differs: {', '.join(inputs)}." if inputs else ""


def names(one: Side, other: Side) -> tuple[str, str]:
    """Each side by the one thing that tells them apart, where that is a parameter, or by its name."""
    keys = differing(one, other)
    if len(keys) != 1 or unexplained(one, other):
        return one.name, other.name
    return tuple(f"{keys[0]} {show(side.params.get(keys[0]))} ({side.name})" for side in (one, other))  # type: ignore[return-value]


def differing(a: Side, b: Side) -> list[str]:
    keys = sorted(a.params.keys() | b.params.keys())
    absent = object()
    return [
        key
        for key in keys
        if key.partition(".")[0] not in IGNORED_SECTIONS and a.params.get(key, absent) != b.params.get(key, absent)
    ]


def went_in(side: Side) -> dict[str, str]:
    """Digests of what the adapter was made from, by the names that the page gives them."""
    lineage = side.lineage
    base = {f"the base's {component}": digest for component, digest in lineage["base"].items()}
    return base | {PICTURES: lineage["dataset"]["content"], LATENTS: lineage["latents"]}


def changed_inputs(a: Side, b: Side) -> list[str]:
    before, after = went_in(a), went_in(b)
    return [name for name in before | after if before.get(name) != after.get(name)]


def unexplained(a: Side, b: Side) -> list[str]:
    """Inputs that differ though no differing parameter moves them."""
    keys = differing(a, b)
    other_base = any(key in NAME_THE_BASE for key in keys)
    other_latents = any(key.startswith(MOVE_LATENTS) for key in keys)
    return [
        name
        for name in changed_inputs(a, b)
        if not (other_latents if name == LATENTS else other_base and name != PICTURES)
    ]


def differences(a: Side, b: Side) -> str:
    """Parameters, and digests of inputs."""
    rows = [(key, show(a.params.get(key, "")), show(b.params.get(key, ""))) for key in differing(a, b)]
    before, after = went_in(a), went_in(b)
    rows += [(name, f"`{before.get(name)}`", f"`{after.get(name)}`") for name in changed_inputs(a, b)]
    return table(("", a.name, b.name), rows) if rows else "None."


def metrics_table(a: Side, b: Side, paired: Estimate | None) -> str:
    """Numbers that both have and that moved, the losses first; whatever else is equal is counted.

    Losses are marked as better or worse only where the paired interval bears that out.
    """
    marked = paired is not None and (paired.high < 0 or paired.low > 0)
    shared = {key for key in a.metrics.keys() & b.metrics.keys() if not HIDDEN.search(key)}
    numbers = sorted(key for key in shared if is_number(a.metrics[key]) and is_number(b.metrics[key]))
    rows = [
        metric_row(key, a.metrics[key], b.metrics[key], marked) for key in numbers if a.metrics[key] != b.metrics[key]
    ]
    rows.sort(key=lambda row: not row[0].startswith("val."))
    if not rows:
        return f"All {len(numbers)} are equal."
    equal = f"{len(numbers) - len(rows)} others are equal."
    legend = f" ✓ better, ✗ worse than {a.name}." if marked else ""
    return table(("Metric", a.name, b.name, "difference"), rows) + f"\n\n{equal}{legend}"


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def metric_row(key: str, a: float, b: float, marked: bool) -> tuple[str, ...]:
    mark = (" ✓" if b < a else " ✗") if marked and LOWER_IS_BETTER.search(key) else ""
    return key, show(a), show(b), signed(b - a, ".4g") + mark


def show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def changed_pictures(a: Side, b: Side) -> Changes:
    """None where a revision has no table of its pictures."""
    return Changes() if a.pictures is None or b.pictures is None else compare_tables(a.pictures, b.pictures)


# The sheets


def draw_thumbnails(changes: Changes, path: Path) -> str:
    """Thumbnails of what changed, where prepare kept some on this machine; returns what the page says of them."""
    from stages.core import thumbnails
    from stages.core.sheets import save_png

    image = thumbnails.changes_sheet(changes)
    path.unlink(missing_ok=True)
    if image is None:
        return ""
    save_png(path, image, max_bytes=thumbnails.SHEET_MAX_BYTES)
    return "\n![Thumbnails](dataset.png)\n"


def draw_sheet(a: Side, b: Side, path: Path) -> str:
    """Base, A's adapter and B's adapter for each prompt that both drew; returns the page's section."""
    from stages.core.sheets import save_png, sheet

    prompts = [prompt for prompt in a.prompts if prompt in b.prompts]
    if not prompts:
        return "\n## Samples\n\nThe two sheets have no prompt in common.\n"
    cells = [cells_by_prompt(side) for side in (a, b)]
    one_base = drawn_from(a) == drawn_from(b)
    labels = ["base", a.name, b.name] if one_base else [f"base of {a.name}", a.name, f"base of {b.name}", b.name]
    rows = []
    for prompt in prompts:
        (base_a, adapter_a), (base_b, adapter_b) = (side[prompt] for side in cells)
        rows.append([base_a, adapter_a, adapter_b] if one_base else [base_a, adapter_a, base_b, adapter_b])
    save_png(path, sheet(rows, prompts, labels, cell=rows[0][0].width), max_bytes=SHEET_BYTES)
    return "\n## Samples\n\n![Samples](samples.png)\n"


def cells_by_prompt(side: Side) -> dict[str, tuple[Image.Image, Image.Image]]:
    """Prompt -> base and adapter, the adapter at strength 1 where the sheet has it, else at the first."""
    from PIL import Image

    from stages.core.sheets import cut

    scales = side.lineage["validate"]["scales"]
    column = 1 + (scales.index(1) if 1 in scales else 0)
    with Image.open(io.BytesIO(side.samples), formats=["PNG"]) as picture:
        rows = cut(picture.convert("RGB"), len(side.prompts), 1 + len(scales), side.lineage["sheet"]["cell"])
    return {prompt: (row[0], row[column]) for prompt, row in zip(side.prompts, rows, strict=True)}


def drawn_from(side: Side) -> dict[str, Any]:
    """All that decides what the base draws for a prompt."""
    settings = {key: value for key, value in side.lineage["validate"].items() if key in SAMPLING}
    size = side.lineage["sheet"]["picture"]
    return settings | {"base": side.lineage["base"], "dtype": side.lineage["model"]["dtype"], "size": size}


if __name__ == "__main__":
    run(main)
