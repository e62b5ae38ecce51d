"""Other runs of a setting that is compared, under another training seed: they say how much a seed moves the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_dag.commands.compare.revisions import head_commit, list_experiments, parents, read_file
from lora_dag.commands.compare.settings import SEED, same_setting, setting, setting_params
from lora_dag.commands.compare.sides import DAMAGED, PARAMS, Side, parse_params, read_commit
from lora_dag.core.console import UserError

MAX_CANDIDATES = 50  # read in about 4 s


def find_repeats(sides: Sequence[Side]) -> list[Side]:
    """Among the commits of ``sides``, their parents and the experiments of both; one run for each seed of a setting."""
    seen = {(setting(side), side.params.get(SEED)) for side in sides}
    wanted = [setting_params(side.params) for side in sides]
    found = []
    for name, commit in list(candidates(sides))[:MAX_CANDIDATES]:
        try:
            if setting_params(parse_params(read_file(commit, PARAMS) or b"{}")) not in wanted:
                continue
            side = read_commit(name, commit)
        except (UserError, *DAMAGED):  # without reports it repeats nothing
            continue
        run = setting(side), side.params.get(SEED)
        if run not in seen and any(run[0] == known for known, _ in seen):
            seen.add(run)
            found.append(side)
    return found


def candidates(sides: Sequence[Side]) -> Iterator[tuple[str, str]]:
    """Name and commit of what may be a repeat, the nearest first."""
    own = dict.fromkeys(filter(None, (side.commit or head_commit() for side in sides)))
    baselines = dict.fromkeys([*own, *(parent for commit in own for parent in parents(commit))])
    taken = {side.commit for side in sides}
    for (baseline, name), commit in list_experiments().items():
        if baseline in baselines and commit not in taken:
            yield name, commit
    for commit in baselines:
        if commit not in taken:
            yield commit[:7], commit


def repeats_of(side: Side, runs: Sequence[Side]) -> list[Side]:
    """``side`` and the runs of its setting under other seeds, one for each seed."""
    by_seed = {side.params.get(SEED): side}
    for run in runs:
        if same_setting(run, side):
            by_seed.setdefault(run.params.get(SEED), run)
    return list(by_seed.values())
