from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from lora_dag.adapters import init_from_pin
from lora_dag.adapters.params import LoraParams
from lora_dag.core import params
from lora_dag.core.console import Problem, UserError
from lora_dag.core.params import FAMILIES
from stages.train.params import TrainParams
from tests.helpers.errors import assert_problem, refused
from tests.helpers.workspace import REPOSITORY


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository's params.yaml in the current directory."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text((REPOSITORY / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    return Path("params.yaml")


def problems(file: Path, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(UserError) as caught:
        params.load(file, overrides)
    return caught.value.problems


def assert_refused(file: Path, overrides: tuple[str, ...], code: str, *values: str) -> None:
    """Assert that the only problem has this code and starts with the first of the values."""
    with refused(code, *values) as caught:
        params.load(file, overrides)
    assert caught.value.problems[0].startswith(values[0])


def test_the_repository_file_has_the_sections_that_stages_read(file: Path) -> None:
    tree = YAML(typ="safe", pure=True).load(file.read_text())
    assert set(params.SECTIONS) <= set(tree)
    assert set(tree) == set(params.SECTIONS)
    for name, values in tree.items():
        assert set(values) == set(params.params_class(name).model_fields), name


@pytest.mark.parametrize("text", ["1e-4", "1e-04", "1.0e-4", "0.0001"])
def test_scientific_notation_is_a_number(file: Path, text: str) -> None:
    assert params.load(file, [f"train.learning_rate={text}"]).section(TrainParams).learning_rate == 1e-4
    written = re.sub(r"learning_rate: \S+", f"learning_rate: {text}", file.read_text())
    assert text in written
    file.write_text(written)
    assert params.load(file).section(TrainParams).learning_rate == 1e-4


def test_no_is_a_string(file: Path) -> None:
    assert_refused(file, ("dataset.flip=no",), "wrong-value", "--set dataset.flip: got 'no'", "boolean")


def test_overrides_leave_the_rest(file: Path) -> None:
    plain = params.load(file).section(LoraParams)
    changed = params.load(file, ["lora.rank=16", "lora.target_modules=[to_q]"]).section(LoraParams)
    assert (changed.rank, changed.target_modules) == (16, ["to_q"])
    assert changed.dropout == plain.dropout
    assert plain.rank == 8


@pytest.mark.parametrize(
    ("overrides", "alpha", "alphas"),
    [
        ([], 8, {}),
        (["lora.rank=16"], 16, {}),
        (["lora.alpha=8", "lora.rank=16"], 8, {}),
        (["lora.alpha=8", "lora.rank_pattern={to_k: 4}"], 8, {}),  # as in PEFT
        (["lora.rank_pattern={to_k: 4, rank: 5}"], 8, {"to_k": 4, "rank": 5}),
        (["lora.rank_pattern={to_k: 4}", "lora.alpha_pattern={to_k: 2, to_v: 3}"], 8, {"to_k": 2, "to_v": 3}),
    ],
)
def test_alpha_null_is_the_rank_of_each_layer(
    file: Path, overrides: list[str], alpha: float, alphas: dict[str, float]
) -> None:
    """And is the default."""
    section = params.load(file, overrides).section(LoraParams)
    assert (section.alpha, section.alpha_pattern) == (alpha, alphas)
    assert isinstance(section.alpha, float)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("lora.rank=x", "--set lora.rank: got 'x'"),
        ("lora.rank=-3", "--set lora.rank: got -3"),
        ("lora.rank=true", "--set lora.rank: got true"),
        ("lora.rank_pattern=3", "--set lora.rank_pattern: got 3"),
        ("lora.rank_pattern={to_k: 0}", "--set lora.rank_pattern.to_k: got 0"),
        ("lora.rank_pattern={to_(k: 2}", "--set lora.rank_pattern: got 'to_(k'"),
        ("train.optimizer=adam", "--set train.optimizer: got 'adam'"),
        ("dataset.subsets=[{path: a}, {path: a}]", "--set dataset.subsets: "),
    ],
)
def test_wrong_setting_is_one_problem(file: Path, override: str, line: str) -> None:
    (problem,) = problems(file, override)
    assert problem.startswith(line)


def test_unknown_key_names_the_near_one(file: Path) -> None:
    assert_refused(file, ("lora.rnak=4",), "unknown-setting", "--set lora.rnak: ", " lora.rank?")


@pytest.mark.parametrize(
    ("override", "code", "values"),
    [
        ("train.lr_warmup_steps=200", "warmup-too-long", ("--set train.lr_warmup_steps: got 200", "num_steps (200)")),
        ("train.early_stop_patience=99", "patience-too-long", ("--set train.early_stop_patience: got 99", "null")),
        ("train.ema_power=0.7", "missing-setting", ("params.yaml train.ema_decay: got null", "ema_power 0.7")),
        ("train.timestep_range=[0.5, 0.5]", "empty-timestep-range", ("--set train.timestep_range: got [0.5, 0.5]",)),
        ("train.logit_std=2", "setting-ignored", ("--set train.logit_std: 2.0", "timestep_sampling uniform", " 1.")),
        ("train.lr_num_cycles=2", "setting-ignored", ("--set train.lr_num_cycles: 2", "lr_scheduler cosine", "to 1.")),
        ("train.lr_power=2", "setting-ignored", ("--set train.lr_power: 2", "lr_scheduler cosine", "to 1.")),
        ("train.optimizer_args={eps: .nan}", "wrong-value", ("--set train.optimizer_args: got {'eps': nan}",)),
        ("runtime.num_machines=2", "uneven-processes", ("params.yaml runtime.num_processes: got 1", "(2)")),
        (
            "dataset.heldout_split=test",
            "heldout-ambiguous",
            ("params.yaml dataset.heldout_fraction: got 0.1", "'test'"),
        ),
        ("dataset.heldout_fraction=null", "heldout-ambiguous", ("--set dataset.heldout_fraction: got null",)),
        ("dataset.caption_column=file_name", "caption-column-invalid", ("--set dataset.caption_column: got 'file_n",)),
        ("dataset.unmasked_weight=0.5", "setting-ignored", ("--set dataset.unmasked_weight: 0.5", "dataset.mask")),
        ("dataset.num_caption_variants=2", "setting-ignored", ("--set dataset.num_caption_variants: 2", "to 1.")),
    ],
)
def test_a_problem_of_several_settings_names_one_to_change(
    file: Path, override: str, code: str, values: tuple[str, ...]
) -> None:
    assert_refused(file, (override,), code, *values)


def test_a_problem_names_the_file_or_the_override(file: Path) -> None:
    file.write_text(file.read_text().replace("\n  rank: 8", "\n  rank: 0"))
    rank, num_steps = problems(file, "train.num_steps=0")
    assert rank.startswith("params.yaml lora.rank: got 0") and num_steps.startswith("--set train.num_steps: got 0")


def test_the_place_of_a_setting_is_the_file_or_the_override(file: Path) -> None:
    config = params.load(file, ["lora.rank=4", "lora.rank_pattern={to_k: 2}"])
    lora, train = config.section(LoraParams), config.section(TrainParams)
    assert lora.setting("rank") == train.setting("lora.rank") == "--set lora.rank"
    assert (lora.setting("alpha"), train.setting("seed")) == ("params.yaml lora.alpha", "params.yaml train.seed")
    assert lora.setting("rank_pattern.to_k") == "--set lora.rank_pattern.to_k"
    assert lora == params.load(file, ["lora.rank=4", "lora.rank_pattern={to_k: 2}"]).section(LoraParams)


def test_unknown_section_names_the_near_one(file: Path) -> None:
    assert_refused(file, ("lroa.rank=4",), "unknown-setting", "--set lroa.rank=4: ", "lora?")
    file.write_text(file.read_text().replace("\nlora:", "\nlroa:"))
    unknown, missing = problems(file)
    assert (unknown.code, missing.code) == ("unknown-setting", "missing-section")
    assert unknown.startswith("params.yaml lroa: ") and "lora?" in unknown and "'lora'" in missing


def test_missing_key_says_what_is_expected(file: Path) -> None:
    file.write_text(file.read_text().replace("  num_steps: 200", "  #"))
    assert_refused(file, (), "missing-setting", "params.yaml train.num_steps: ", "int")


def test_a_family_is_one_of_the_files_there_are(file: Path) -> None:
    names = {path.stem for path in (REPOSITORY / "lora_dag/families").glob("*.py")}
    assert set(FAMILIES) == names - {"__init__", "common", "long_texts", "protocol", "quantized", "unet"}
    values = ("--set model.family: got 'z_imag'", *map(repr, FAMILIES), " z_image?")
    assert_refused(file, ("model.family=z_imag",), "wrong-value", *values)
    file.write_text(re.sub("  family: .*", "  #", file.read_text()))
    assert_refused(file, (), "missing-setting", "params.yaml model.family: ", json.dumps(FAMILIES))


def test_all_problems_are_reported_at_once(file: Path) -> None:
    found = problems(file, "lora.rank=0", "train.num_steps=-1", "model.family=sdxxl", "dataset.resolution=sixty")
    assert [problem.split(":")[0] for problem in found] == [
        "--set model.family",
        "--set dataset.resolution",
        "--set lora.rank",
        "--set train.num_steps",
    ]
    assert "got 'sixty'" in found[1]
    assert "got 0" in found[2]


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ("lora.target_modules=3", ("lora.target_modules: got 3", "a valid string or a valid list")),
        ("lora.target_modules=[to_q, 3]", ("lora.target_modules.1: got 3", "a valid string")),
        ("lora.target_modules=[]", ("lora.target_modules: got []", "at least 1 item")),
        ("train.timestep_shift=atuo", ("train.timestep_shift: got 'atuo'", "a valid number or 'auto'", " auto?")),
        ("train.timestep_shift=-1", ("train.timestep_shift: got -1", "greater than 0")),
        ("lora.rank_pattern={str: x}", ("lora.rank_pattern.str: got 'x'", "a valid integer")),
        ("validate.prompts=3", ("validate.prompts: got 3", "a valid list")),
        ("train.timestep_range=[0.1]", ("train.timestep_range: got [0.1]", "at least 2 items are expected.")),
        ("dataset.background=red", ("dataset.background: got 'red'", "'#ffffff'")),
        ("export.license='a b'", ("export.license: got 'a b'", "'apache-2.0'")),
        ("dataset.resolution=", ("dataset.resolution: got null", "a valid integer")),
        ("dataset.crop=cente", ("dataset.crop: got 'cente'", "'center' or 'random'", " center?")),
    ],
)
def test_value_of_another_type_is_one_line(file: Path, change: str, values: tuple[str, ...]) -> None:
    assert_refused(file, (change,), "wrong-value", f"--set {values[0]}", *values[1:])


@pytest.mark.parametrize(
    "key", ["export.prompt", "report.title", "validate.prompts", "dataset.subsets", "train.optimizer_args"]
)
def test_half_a_character_is_refused(file: Path, key: str) -> None:
    value = {"validate.prompts": '["\\ud800"]', "dataset.subsets": '[{path: "\\ud800"}]'}.get(key, '"a\\ud800"')
    assert_refused(file, (f"{key}={value}",), "half-character", f"--set {key}: ", r"'\ud800'")


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_are_finite(file: Path, value: str) -> None:
    change = f"train.learning_rate={value}"
    assert_refused(file, (change,), "wrong-value", "--set train.learning_rate: got ", "a finite number")


@pytest.mark.parametrize("override", ["lora.rank", "rank=4", ".rank=4", "lora.=4"])
def test_malformed_override(file: Path, override: str) -> None:
    assert_refused(file, (override,), "wrong-override", f"--set {override}: ", "SECTION.KEY=VALUE", "lora.rank=16")


def test_override_that_is_no_yaml(file: Path) -> None:
    override = "lora.target_modules=[to_q"
    assert_refused(file, (override,), "ambiguous-override", f"--set {override}: ", "expected ',' or ']'", "quotes")


def test_a_section_that_is_no_mapping(file: Path) -> None:
    file.write_text("lora: 3\n")
    assert any(problem.startswith("params.yaml lora: got 3") for problem in problems(file))


@pytest.mark.parametrize(
    ("text", "code", "start"),
    [
        (None, "params-missing", "params.yaml: "),
        (b"\xff", "not-utf8", "params.yaml: "),
        (b"- 1\n", "no-mapping", "params.yaml: got list"),
        (b"", "no-mapping", "params.yaml: got null"),
        (b"lora:\n  rank: 4\n  rank: 8\n", "invalid-yaml", "params.yaml:3: "),
        (b"lora:\n  rank: [4\n", "invalid-yaml", "params.yaml:"),
        (b"report:\n  title: 2026-99-99\n", "invalid-yaml", "params.yaml: invalid YAML (month must be in 1..12)"),
        (b"[" * 2000, "invalid-yaml", "params.yaml: "),
    ],
)
def test_a_file_that_cannot_be_read(file: Path, text: bytes | None, code: str, start: str) -> None:
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text)
    assert_refused(file, (), code, start)


def test_section_names_that_are_no_strings(file: Path) -> None:
    file.write_text("3: {a: 1}\n~: 1\n")
    found = problems(file)[:2]
    assert [problem.code for problem in found] == ["unknown-setting"] * 2
    assert found[0].startswith("params.yaml 3: ") and found[1].startswith("params.yaml None: ")


def test_an_override_that_is_no_date(file: Path) -> None:
    override = "report.title=2026-99-99"
    assert_refused(file, (override,), "ambiguous-override", f"--set {override}: ", "'2026-99-99'")


def test_params_are_frozen(file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        params.load(file).section(LoraParams).rank = 3


@pytest.mark.parametrize(
    ("subsets", "values"),
    [
        ("[{pth: a}]", ("unknown-setting", "--set dataset.subsets.0.pth: ", " dataset.subsets.0.path?")),
        (
            "[{path: a}, {path: b, repeets: 2}]",
            ("unknown-setting", "--set dataset.subsets.1.repeets: ", "dataset.subsets.1.repeats?"),
        ),
        ("[{path: a, repeats: 0}]", ("wrong-value", "--set dataset.subsets.0.repeats: got 0", "equal to 1")),
        ("[ink]", ("wrong-type", "--set dataset.subsets.0: got 'ink'", "{path: ...}")),
    ],
)
def test_a_mistake_inside_a_list_names_its_place(file: Path, subsets: str, values: tuple[str, str, str]) -> None:
    with pytest.raises(UserError) as caught:
        params.load(file, [f"dataset.subsets={subsets}"])
    assert_problem(caught.value, *values)


BOTH = {text: f'\\"{text}\\"' for text in ("a fox: it's night", "'70s fox")}  # quotes that an apostrophe ends not
LOST = [
    ("dataset.background=#000000", "'#' begins a comment in YAML", "'#000000'"),
    ("export.prompt=a fox #1", "'#' begins a comment in YAML", "'a fox #1'"),
    ("export.prompt= #1 fox", "'#' begins a comment in YAML", "'#1 fox'"),
    (
        "report.title=a fox: it's night",
        'YAML reads {"a fox": "it\'s night"}, which is no text',
        BOTH["a fox: it's night"],
    ),
    ("report.title=[red] fox", "invalid YAML (expected '<document start>', but found", "'[red] fox'"),
    ("export.prompt=|", "YAML reads an empty text", "'|'"),
    ("export.prompt=`a` $HOME", "invalid YAML (found character", r"'\`a\` \$HOME'"),
    ('export.prompt=[a "b" c]', "YAML reads [", r"'[a \"b\" c]'"),
    ("report.title={a}", 'YAML reads {"a": null}, which is no text', "'{a}'"),
    ("report.title=2024", "YAML reads 2024, which is no text", "'2024'"),
    ("dataset.caption_prefix=null", "YAML reads null, which is no text", "'null'"),
    ("export.license=true", "YAML reads true, which is no text", "'true'"),
    ("export.prompt=&x", "YAML reads null", "'&x'"),
    ("report.title='70s fox", "invalid YAML (found unexpected end of stream)", BOTH["'70s fox"]),
    ("dataset.instance_prompt=*star", "invalid YAML (found undefined alias 'star')", "'*star'"),
    ("dataset.instance_prompt=@home", "invalid YAML (found character '@'", "'@home'"),
]


@pytest.mark.parametrize(("override", "why", "form"), LOST)
def test_a_text_that_yaml_reads_otherwise_is_refused_with_the_form_that_works(
    file: Path, override: str, why: str, form: str
) -> None:
    (line,) = problems(file, override)
    key, _, value = override.partition("=")
    assert line.code == "ambiguous-override"
    assert line.startswith(f"--set {override}: {why}") and line.endswith(f' "{key}={form}".')
    section, _, name = key.partition(".")
    word = subprocess.run(["bash", "-c", f'printf %s "{key}={form}"'], capture_output=True, text=True).stdout
    assert getattr(params.load(file, [word]).sections[section], name) == value.strip()


@pytest.mark.parametrize(
    "text",
    ["é ü ñ", "雪の中の狐", "ثعلب", "fox 🦊 café", "it's", 'the "fox"', "a, b", "[a]", "a/b (c)", "50%", "a'b\"c: #d"],
)
def test_a_text_in_quotes_arrives_as_written(file: Path, text: str) -> None:
    quoted = "'" + text.replace("'", "''") + "'"
    loaded = params.load(file, [f"export.prompt={quoted}", f"validate.prompts=[{quoted}]"])
    assert loaded.sections["export"].prompt == text and loaded.sections["validate"].prompts == [text]  # type: ignore[attr-defined]


def test_a_comment_in_the_file_that_took_the_text_is_named(file: Path) -> None:
    file.write_text(file.read_text().replace('background: "#ffffff"', "background: #ffffff"))
    assert_refused(
        file, (), "wrong-value", "params.yaml dataset.background: got null", "'#' begins a comment", "quotes"
    )
    changes = ("dataset.background='#000000'", "validate.prompts=[a fox: night]")
    start = '--set validate.prompts.0: got {"a fox": "night"}'
    assert_refused(file, changes, "wrong-value", start, "': ' makes a mapping", "quotes")


def settings_of_the_docs() -> list[str]:
    """``section.key=value`` in commands and inline code of README and docs; lists of values for --queue are DVC's."""
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", " ")
    fenced = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = [code for line in plain.splitlines() for code in re.findall("`([^`]+)`", line)]
    words: list[str] = []
    for line in [*fenced, *inline]:
        if re.search(r"\b[a-z]+\.[a-z_]+=", line) and "--queue" not in line:
            starts_with_a_setting = re.match(r"[a-z]+\.[a-z_]+=", line)
            words += [line] if starts_with_a_setting else shlex.split(line, comments=True)
    found = [word for word in words if re.fullmatch(r"[a-z]+\.[a-z_]+=.+", word) and "..." not in word]
    return sorted({word for word in found if word.partition(".")[0] in set(params.SECTIONS) - {"sweep"}})


MAPPINGS = [
    "lora.rank_pattern={attn2.to_k: 16}",
    "lora.alpha_pattern={attn2.to_k: 16, to_v: 0.5}",
    "train.optimizer_args={betas: [0.9, 0.99], eps: 1e-7}",
]
TEXTS = ("a, b: #c", "雪の中の狐", "é 🦊", "[a] {b} (c)", "3", "null", " a ", 'a "b"')
QUOTED = [f"export.prompt='{text}'" for text in TEXTS]
QUOTED += ['export.prompt="it\'s"', "validate.prompts=['a, b', \"it's 雪\"]", "dataset.background='#000000'"]


def test_each_setting_of_the_docs_is_the_same_by_dvc_and_by_set(file: Path) -> None:
    """As `dvc exp run -S` writes it into the file, and as `--set` reads it."""
    found = settings_of_the_docs()
    assert len(found) > 25 and {"lora.rank_pattern={attn2.to_k: 16}", "dataset.caption_prefix='sks, '"} <= set(found)
    before = file.read_bytes()
    for setting in [*found, *MAPPINGS, *QUOTED]:
        by_set = params.read_with_overrides(file, [setting])
        apply_overrides(file, [setting])
        assert params.read_yaml(file) == by_set, setting
        file.write_bytes(before)


@pytest.mark.parametrize("setting", MAPPINGS)
def test_a_mapping_is_set_replaced_and_emptied_by_dvc(file: Path, setting: str) -> None:
    """DVC adds to a mapping that is there, and ``{}`` changes nothing: null first."""
    key = setting.partition("=")[0]
    empty = params.load(file).sections
    for null in (f"{key}=null", f"{key}={{}}"):
        assert params.load(file, [null]).sections == empty
    apply_overrides(file, [setting])
    changed = params.load(file).sections
    assert changed != empty
    other = setting.replace("attn2.to_k", "attn1.to_k").replace("betas", "eps").replace("[0.9, 0.99], eps: ", "")
    apply_overrides(file, [f"{key}=null", other])
    assert params.load(file).sections == params.load(REPOSITORY / "params.yaml", [other]).sections
    apply_overrides(file, [f"{key}=null"])
    assert params.load(file).sections == empty


def test_a_tilde_is_expanded_where_no_stage_depends_on_the_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    settings = ("lora.init_from={path: ~/a.safetensors}", "validate.feature_model={path: ~/clip}")
    sections = params.load(file, settings).sections
    assert sections["lora"].init_from.path == "/home/someone/a.safetensors"  # type: ignore[attr-defined]
    assert sections["validate"].feature_model.path == "/home/someone/clip"  # type: ignore[attr-defined]
    for key in ("dataset.source", "model.pretrained"):
        assert_refused(file, (f"{key}=~/x",), "path-with-tilde", f"--set {key}: got '~/x'", "/home/someone/x")


def test_a_base_where_dvc_would_look_in_another_place_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    for name in ("data/sd#1", "data/sd?"):
        assert_refused(
            file, (f"model.pretrained='{name}'",), "base-path-character", f"--set model.pretrained: got '{name}'"
        )
    setting = "model.pretrained=/mnt/sd15"
    assert params.load(file, (setting,)).section(params.ModelParams).pretrained == "/mnt/sd15"  # Snakemake finds it
    monkeypatch.setenv("DVC_STAGE", "train")
    assert_refused(file, (setting,), "base-path-absolute", "--set model.pretrained: got", "ln -s /mnt/sd15 data/sd15")


@pytest.mark.parametrize("path", ["data/x.safetensors", "data/é 雪.safetensors", "data/it's, mine.safetensors", "a/$b"])
def test_the_line_that_pins_a_file_is_read_by_dvc_and_by_set(file: Path, path: str) -> None:
    for setting in ("lora.init_from", "validate.feature_model"):
        _, word = shlex.split(init_from_pin.override(setting, path, "ab" * 32))
        by_set = params.read_with_overrides(file, [word])
        apply_overrides(file, [word])
        assert params.read_yaml(file) == by_set
        section, _, name = setting.partition(".")
        assert by_set[section][name] == {"path": path, "sha256": "ab" * 32}


def test_an_override_reaches_a_nested_setting_as_in_dvc(file: Path) -> None:
    change = "report.gates.max_heldout_change=0.5"
    ours = params.read_with_overrides(file, [change, "report.gates.limits={samples.copied_share: 0.1}"])
    assert ours["report"]["gates"]["max_heldout_change"] == 0.5
    assert ours["report"]["gates"]["limits"] == {"samples.copied_share": 0.1}
    with_override = params.read_with_overrides(file, [change])
    apply_overrides(file, [change])
    assert YAML(typ="safe", pure=True).load(file.read_text()) == with_override
    with refused("unknown-setting", "--set lora.rank.x: "):
        params.load(file, ["lora.rank.x=4"])


def test_a_merge_conflict_is_named_with_its_line(file: Path) -> None:
    text = file.read_text().replace("lora:\n", "<<<<<<< HEAD\nlora:\n=======\nlora:\n>>>>>>> other\n")
    line = text[: text.index("<<<<<<<")].count("\n") + 1
    file.write_text(text)
    with refused("merge-conflict-left", f"params.yaml:{line}: ", "`git add`"):
        params.load(file)


def test_a_folder_instead_of_a_file_is_refused(file: Path) -> None:
    with refused("params-missing", f"{file.absolute().parent}: a folder"):
        params.load(file.absolute().parent)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=2026-12-01", "got 2026-12-01, "),
        ("train.optimizer_args=[1, true]", "got [1, true], "),
        ("report.gates=null", "got null, "),
    ],
)
def test_a_wrong_value_is_shown_as_the_file_has_it(file: Path, override: str, value: str) -> None:
    (problem,) = problems(file, override)
    assert problem.startswith(f"--set {override.partition('=')[0]}: ") and value in problem
