"""Checks of settings for `lora-dag check` and for the plan of a sweep; nothing here reads images or weights."""

from __future__ import annotations

from pathlib import Path

from lora_dag.adapters import init_from_pin
from lora_dag.adapters.params import LoraParams
from lora_dag.core.console import Problem, UserError
from lora_dag.core.params import Config, ModelParams, RuntimeParams
from lora_dag.families.protocol import load_family
from lora_dag.formats import AdapterKind
from lora_dag.pipeline.yaml_edit import to_flow_yaml
from lora_dag.sweeps.grid import Run
from stages.cache_latents.params import CacheParams, flip_problems
from stages.export.params import ExportParams, format_problems, rank_problems, step_problems
from stages.prepare.params import DatasetParams
from stages.train.params import TrainParams, cross_problems
from stages.validate import feature_files
from stages.validate.params import ValidateParams, prompt_problems


def machine_notes(config: Config) -> list[str]:
    """Return a note for several machines, which DVC cannot start."""
    runtime = config.section(RuntimeParams)
    if runtime.num_machines == 1:
        return []
    place = f"{runtime.setting('num_machines')}: got {runtime.num_machines}"
    return [f"{place}, but `dvc repro` stops before train. Use `snakemake --workflow-profile profiles/slurm`."]


def snapshot_notes(config: Config) -> list[str]:
    """Return a note for a training that saves no snapshot before its last step."""
    train = config.section(TrainParams)
    every = train.snapshot_every_n_steps
    if every <= train.num_steps:
        return []
    place = f"{train.setting('snapshot_every_n_steps')}: got {every} for {train.num_steps} steps"
    return [f"{place}. Progress sheet and held-out curve have only start and end; set a lower value for more."]


def mapping_notes(config: Config) -> list[str]:
    """Return notes on mappings with entries: DVC's -S adds to them, and ``{}`` does not empty them."""
    lora, train = config.section(LoraParams), config.section(TrainParams)
    alphas = {key: value for key, value in lora.alpha_pattern.items() if value != lora.rank_pattern.get(key)}
    found = (
        (lora, "lora", "rank_pattern", lora.rank_pattern),
        (lora, "lora", "alpha_pattern", alphas),  # alpha: null adds the ranks to the file's own
        (train, "train", "optimizer_args", train.optimizer_args),
    )
    return [
        f"{section.setting(key)}: got {to_flow_yaml(value)}. `-S` adds to it, `-S {name}.{key}=null` empties it, "
        f"and `-S {name}.{key}=null -S '{name}.{key}={{...}}'` replaces it."
        for section, name, key, value in found
        if value
    ]


def setting_problems(config: Config) -> list[Problem]:
    """Return problems of settings that exclude each other, and of the adapter to start from."""
    family = load_family(config.section(ModelParams).family)
    lora, train = config.section(LoraParams), config.section(TrainParams)
    found: list[Problem] = [*flip_problems(config.section(DatasetParams).flip, config.section(CacheParams))]
    found += export_problems(config)
    if start := lora.init_from:
        found += init_from_pin.problems(start.path, start.sha256, lora.setting("init_from"))
    return [*found, *cross_problems(lora, train, family), *prompt_problems(config.section(ValidateParams), family)]


def sweep_problems(runs: list[Run]) -> list[Problem]:
    """Return the problems of all runs of a sweep, each once, with the name of the first run that has it."""
    first: dict[Problem, str] = {}
    for each in runs:
        for problem in UserError(*setting_problems(each.config), *pin_problems(each.config)).problems:
            first.setdefault(problem, f" (sweep: {each.name})" if len(runs) > 1 else "")
    return [Problem(problem.code, problem + name) for problem, name in first.items()]


def pin_problems(config: Config) -> list[Problem]:
    """Return problems of a feature model that is missing or not pinned.

    The digest is checked by validate: it takes seconds per gigabyte, and every Snakemake job makes the plan again.
    """
    validate = config.section(ValidateParams)
    model = validate.feature_model
    if model is None or (model.sha256 and Path(model.path).exists()):
        return []
    return list(feature_files.model_problems(model, validate.setting("feature_model")))


def export_problems(config: Config) -> list[Problem]:
    """Return problems of formats that cannot hold the adapter, and of an exported step without a snapshot."""
    lora, train, export = config.section(LoraParams), config.section(TrainParams), config.section(ExportParams)
    adapter = AdapterKind(
        algo=lora.algo,
        bias=lora.bias,
        use_dora=lora.use_dora,
        rank=max([lora.rank, *lora.rank_pattern.values()]),
        denoiser=load_family(config.section(ModelParams).family).DENOISER,
        trains_text=lora.train_text_encoder,
    )
    return [
        *format_problems(export.formats, adapter, export.setting("formats")),
        *step_problems(export.step, train.snapshot_steps, train.num_steps, export.setting("step")),
        *rank_problems(export.resized_ranks, adapter, export.setting("resized_ranks")),
    ]
