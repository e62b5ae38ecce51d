"""Find runs of the compared settings with other training seeds: they show how much a seed changes the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_dag.commands.compare.revision_report import DAMAGED, PARAMS, RevisionReport, parse_params, read_commit
from lora_dag.commands.compare.revisions import head_commit, list_experiments, parents, read_file
from lora_dag.commands.compare.run_inputs import SEED, same_setting, setting, setting_params
from lora_dag.core.console import UserError

MAX_CANDIDATES = 50  # read in about 4 s


def find_repeats(revisions: Sequence[RevisionReport]) -> list[RevisionReport]:
    """Return other runs of the settings of ``revisions``, one for each seed of a setting.

    Candidates are the commits of ``revisions``, their parents, and the DVC experiments of both.
    """
    seen = {(setting(revision), revision.params.get(SEED)) for revision in revisions}
    wanted = [setting_params(revision.params) for revision in revisions]
    found = []
    for name, commit in list(candidates(revisions))[:MAX_CANDIDATES]:
        try:
            if setting_params(parse_params(read_file(commit, PARAMS) or b"{}")) not in wanted:
                continue
            revision = read_commit(name, commit)
        except (UserError, *DAMAGED):  # a commit without reports is no repeat
            continue
        run = setting(revision), revision.params.get(SEED)
        if run not in seen and any(run[0] == known for known, _ in seen):
            seen.add(run)
            found.append(revision)
    return found


def candidates(revisions: Sequence[RevisionReport]) -> Iterator[tuple[str, str]]:
    """Yield name and commit of possible repeats, the nearest first."""
    own = dict.fromkeys(filter(None, (revision.commit or head_commit() for revision in revisions)))
    baselines = dict.fromkeys([*own, *(parent for commit in own for parent in parents(commit))])
    taken = {revision.commit for revision in revisions}
    for (baseline, name), commit in list_experiments().items():
        if baseline in baselines and commit not in taken:
            yield name, commit
    for commit in baselines:
        if commit not in taken:
            yield commit[:7], commit


def repeats_of(revision: RevisionReport, runs: Sequence[RevisionReport]) -> list[RevisionReport]:
    """Return ``revision`` and the runs of its setting with other seeds, one for each seed."""
    by_seed = {revision.params.get(SEED): revision}
    for run in runs:
        if same_setting(run, revision):
            by_seed.setdefault(run.params.get(SEED), run)
    return list(by_seed.values())
