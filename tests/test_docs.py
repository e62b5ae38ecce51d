"""README, docs and the other pages: links and anchors, commands, settings, paths and plain words."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from fnmatch import fnmatch
from io import StringIO
from pathlib import Path

import pytest
import snakemake.cli
from dvc.cli import DvcParserError
from dvc.cli import parser as dvc_parser

from lora_dag import commands
from lora_dag.core import params
from lora_dag.core.console import UserError
from lora_dag.core.params import SECTIONS, params_class
from lora_dag.evaluation.metrics import DATA, key_of
from lora_dag.sweeps.grid import from_command_line, plan
from tests import messages, settings_page
from tests.helpers.checkout import Checkout
from tests.helpers.documents import PAGES, Command, Page, anchor, settings_of, simple_commands
from tests.helpers.workspace import REPOSITORY

FIGURES = ("flowchart", "graph", "sequenceDiagram", "stateDiagram-v2", "timeline", "gantt")
ROOTS = (
    "lora_dag", "stages", "tests", "docs", "base", "benchmarks", "profiles", "rules", "reports", ".github", ".ci",
)  # fmt: skip
OF_ONE_SETTING = ("wrong-type", "wrong-value", "unknown-setting")
"""Codes of problems that no other setting can cure."""
HISTORY = "CHANGELOG.md"
"""It may name settings and files that are gone."""
OUTPUTS = (
    "reports/report.html",
    "reports/sweep*",
    "reports/train/steps.csv",
    "docs/images/*",
)
"""Files below ROOTS that a run writes and git ignores."""
SECTION = "|".join(SECTIONS)
RIDDLES = (
    # The sentences of notes of 2026-11 that no reader understood at the first reading, by the words that made it so.
    r"has only ever seen (colou?red )?icons, and a LoRA",
    r"needs none of it",
    r"so this tries the way",
    r"tells more\b",
    r"wants? (a|an|the|quotes|one|init_lora_weights)\b",
    r"those of params\.yaml",
    r"of a list of captions, one is drawn",
    r"drawn one by one by content",
    r"whatever made the stage run",
    r"differs in the seed alone is never called",
    r"on the workspace adds up",
    r"Runs that share a training",
    r"stands? (in|for|there|on|to)\b",
    r"stands? beside",
    r"What came of it",
    r"would not make again",
    r"a clone without data and without torch tells",
    r"closes? (where|it|the|max_|no)\b",
    r"a missing figure",
    r"is told\b",
    r"take it off to the bit",
    r"encoded anew",
    r"keeps from being read",
    r"go(es|ing)? without\b",
    r"asked (for|the|in)\b",
    r"asks? (for )?(no|nothing|CLIP|it)\b",
    r"laid on\b",
    r"squared errors,$",
    r"would go on\b",
    r"edits there since",
    r"of the training set beside",
    r"can vouch for",
    r"it is all the same",
    r"\bwhat it is\b",
    r"\bcolou?r(ed)? of what\b",
    r"would ask\b|to be asked\b",
    r"\bpictures?\b(?!/|\.)",
)


@pytest.fixture(params=PAGES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def page(request: pytest.FixtureRequest) -> Page:
    return Page(request.param)


def all_commands() -> list[Command]:
    return [command for path in PAGES for command in Page(path).commands]


def fail(problems: list[str], what: str) -> None:
    """Fail with every problem of a page in a line of its own."""
    if problems:
        pytest.fail(f"{what}:\n" + "\n".join(problems), pytrace=False)


def test_settings_page_is_current() -> None:
    written = settings_page.PAGE.read_text(encoding="utf-8")
    assert written == settings_page.page(), "run `python -m tests.settings_page --write`"


def test_links_and_anchors_exist(page: Page) -> None:
    problems = []
    for line, target in page.links:
        path, _, fragment = target.partition("#")
        file = (page.path.parent / path).resolve() if path else page.path
        if not file.exists():
            problems.append(f"{page.name}:{line}: {target}: no such file")
        elif fragment and file.suffix == ".md" and fragment not in Page(file).anchors:
            problems.append(f"{page.name}:{line}: {target}: no such heading in {file.name}")
    fail(problems, "broken links")


def test_shell_blocks_parse(page: Page, tmp_path: Path) -> None:
    problems = []
    for block in page.blocks:
        if block.language in ("sh", "bash"):
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            if done.returncode:
                problems.append(f"{page.name}:{block.line}: {done.stderr.strip()}")
    fail(problems, "shell blocks with syntax errors")


def test_python_blocks_compile(page: Page) -> None:
    problems = []
    for block in page.blocks:
        if block.language in ("python", "py"):
            try:
                ast.parse(block.text)
            except SyntaxError as error:
                problems.append(f"{page.name}:{block.line}: {error}")
    fail(problems, "Python blocks with syntax errors")


def test_figures_are_mermaid(page: Page) -> None:
    for block in page.blocks:
        if block.language == "mermaid":
            lines = [line for line in block.text.splitlines() if line.strip() and not line.lstrip().startswith("%%")]
            assert lines and lines[0].split()[0] in FIGURES, f"{page.name}:{block.line}: no kind of figure"
            assert len(lines) > 1, f"{page.name}:{block.line}: an empty figure"


def test_code_blocks_are_closed(page: Page) -> None:
    assert page.text.count("```") % 2 == 0


def test_pages_have_commands_to_check() -> None:
    """The readers of pages still find what the other tests look at."""
    programs = {command.words[0] for command in all_commands()}
    assert {"lora-dag", "dvc", "snakemake", "git", "python"} <= programs


def test_commands_and_options_exist(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    fail([f"{command}: {problem}" for command in page.commands for problem in command_problems(command)], "commands")


@pytest.mark.parametrize(
    "line",
    [
        "lora-dag chekc",
        "lora-dag compare --nothing HEAD rank-16",
        "dvc exp runn",
        "dvc exp run --sett lora.rank=16",
        "snakemake --no-such-option",
        "snakemake --config 'grid={lora.rnk: [4]}'",
        "snakemake --workflow-profile profiles/nowhere",
        "python -m stages.nothing",
        "python -m lora_dag.evaluation.metrics --wirte",
    ],
)
def test_a_wrong_command_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    (command,) = simple_commands(line, "page.md:1")
    assert list(command_problems(command))


def test_headings_have_the_anchors_of_github() -> None:
    assert anchor("Error: `x` [code](a.md), again!") == "error-x-code-again"
    assert anchor("8. Open the pull request") == "8-open-the-pull-request"


def command_problems(command: Command) -> Iterator[str]:
    program, *words = command.words
    if any(word in ("...", "…") or word.isupper() and word.isalpha() and len(words) == 1 for word in words):
        return  # a pattern such as `lora-dag COMMAND`
    if program == "lora-dag":
        yield from lora_dag_problems(words)
    elif program == "python" and words[:1] == ["-m"]:
        yield from module_problems(words[1], words[2:])
    elif program == "dvc":
        yield from dvc_problems(words, command.complete)
    elif program == "snakemake":
        yield from snakemake_problems(words)


def lora_dag_problems(words: list[str]) -> Iterator[str]:
    try:
        names = [word for word in words if not word.startswith("-")]
        if "--help" in words or len(words) == 1 or names[:1] == ["COMMAND"]:
            assert not names or names[0] in commands.COMMANDS or names[0] == "COMMAND", f"no command {names[0]}"
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(argparse.ArgumentParser, "error", raise_usage)
                commands.parse(words)
    except (AssertionError, UserError, ValueError, SystemExit) as error:
        if "no such file" not in str(error):  # a file that a run writes, checked while the command line is parsed
            yield str(error)


def raise_usage(_: argparse.ArgumentParser, message: str) -> None:
    raise ValueError(message)


def module_problems(module: str, words: list[str]) -> Iterator[str]:
    if re.fullmatch(r"[\w.]*[A-Z]\w*", module):
        return  # a pattern such as `python -m stages.STAGE`
    if module in ("venv", "pytest", "dvc", "snakemake", "lora_dag"):
        return
    found = importlib.util.find_spec(module)
    if found is None:
        yield "no such module"
        return
    source = (
        found.origin if not found.submodule_search_locations else str(Path(str(found.origin)).parent / "__main__.py")
    )
    text = Path(str(source)).read_text(encoding="utf-8") if source and Path(source).exists() else ""
    if not text:
        yield "the package has no __main__.py"
    if "__main__" not in text and not str(source).endswith("__main__.py"):
        yield "the module runs nothing"
    code = text + (REPOSITORY / "lora_dag/core/console.py").read_text(encoding="utf-8")
    for word in words:
        if word.startswith("--") and f'"{word.partition("=")[0]}"' not in code:
            yield f"no option {word}"


def dvc_problems(words: list[str], complete: bool) -> Iterator[str]:
    parser = dvc_parser.get_main_parser()
    if complete:
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                parser.parse_args(["x" if word == "NAME" else word for word in words])
        except (DvcParserError, SystemExit):
            yield "dvc rejects this command line"
        return
    for word in words:  # a code span: a command, perhaps without its arguments
        choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if choices and not word.startswith("-"):
            if word not in choices[0]:
                yield f"dvc has no command {word}"
                return
            parser = choices[0][word]
        elif word.startswith("--") and not any(word in action.option_strings for action in parser._actions):
            yield f"dvc has no option {word}"


def snakemake_problems(words: list[str]) -> Iterator[str]:
    given = {}
    if "--config" in words:
        start = words.index("--config") + 1
        for word in words[start:]:
            if word.startswith("-"):
                break
            key, equals, value = word.partition("=")
            given[key] = value
            if not equals:
                yield f"--config {word}: expected KEY=VALUE"
    options = {option for action in snakemake.cli.get_argument_parser()._actions for option in action.option_strings}
    for word in words:
        if word.startswith("-") and len(word) > 2 and word.partition("=")[0] not in options:
            yield f"snakemake has no option {word}"
        if word.startswith("profiles/") and not (REPOSITORY / word).is_dir():
            yield f"{word}: no such profile"
    if given and not any("..." in value or "$(" in value for value in given.values()):
        try:
            tree = from_command_line(params.read_yaml(REPOSITORY / "params.yaml"), given)
            plan(tree)
        except UserError as error:
            yield from error.problems


def test_settings_of_commands_are_valid(page: Page) -> None:
    """All settings of one command together, as a run would read them."""
    problems = []
    for command in page.commands:
        given = [setting for setting in settings_of(command) if not is_pattern(setting)]
        if "--queue" in command.words:  # several values, one experiment each
            given = [setting.partition(",")[0] if "[" not in setting else setting for setting in given]
        try:
            params.load(REPOSITORY / "params.yaml", given)
        except UserError as error:
            problems += [f"{command}: {problem}" for problem in error.problems]
    fail(problems, "settings that a run rejects")


def is_pattern(setting: str) -> bool:
    return "..." in setting or "…" in setting or not re.match(rf"({SECTION})\.[a-z_]+=", setting)


def test_settings_in_the_text_exist(page: Page) -> None:
    if page.name == HISTORY:
        return
    problems = []
    for line, span in page.spans:
        match = re.match(rf"({SECTION})\.([a-z_0-9]+)(?!\w)", span)
        if match is None or match[2] in ("html", "md", "json", "py") or is_metric(span):
            continue
        if match[2] not in params_class(match[1]).model_fields:
            problems.append(f"{page.name}:{line}: `{span}`: section {match[1]} has no setting {match[2]}")
        elif "=" in span and not is_pattern(span):
            try:
                params.load(REPOSITORY / "params.yaml", [span])
            except UserError as error:
                # A rule about two settings may need the other one, which the text around the span names.
                wrong = [problem for problem in error.problems if problem.code in OF_ONE_SETTING]
                problems += [f"{page.name}:{line}: `{span}`: {problem}" for problem in wrong]
    fail(problems, "settings that do not exist")


def is_metric(span: str) -> bool:
    name = re.split(r"[:=\s,]", span)[0]
    return key_of(name) is not None or name in DATA or "*" in name


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return listed.stdout.splitlines()


def test_paths_in_the_text_exist(page: Page) -> None:
    if page.name == HISTORY:
        return
    files = tracked()
    folders = {parent.as_posix() for file in files for parent in Path(file).parents}
    problems = []
    for line, span in page.spans:
        if not re.fullmatch(rf"({'|'.join(map(re.escape, ROOTS))})/[\w./*+{{}},-]*", span):
            continue
        path = re.sub(r"\b[A-Z]{3,}\b", "*", span).rstrip("/")
        known = path in folders or path in files or any(fnmatch(file, path) for file in (*files, *folders))
        if not known and not any(fnmatch(path, output) for output in OUTPUTS):
            problems.append(f"{page.name}:{line}: `{span}`: git tracks no such path")
    fail(problems, "paths that do not exist")


TEXTS = {
    **{path.relative_to(REPOSITORY).as_posix(): None for path in PAGES},
    "params.yaml": None,
    "messages": None,
}


@pytest.mark.parametrize("name", TEXTS)
def test_no_riddles(name: str) -> None:
    text = messages.catalog() if name == "messages" else (REPOSITORY / name).read_text(encoding="utf-8")
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        for riddle in RIDDLES:
            if match := re.search(riddle, line):
                problems.append(f"{name}:{number}: '{match[0]}' in: {line.strip()[:160]}")
    fail(problems, "riddles; write what is meant (CONTRIBUTING.md, Language)")


QUICK = (
    r"lora-dag --help",
    r"lora-dag (status|explain|relock|verify)\b.*",
    r"lora-dag gc .*",
    r"lora-dag compare HEAD rank-16",
    r"dvc (status|params diff|metrics diff|queue status|exp show|plots diff)\b.*",
    r"snakemake -n .*",
)
"""Commands of the pages that run in seconds, in the repository of a finished run with a branch `rank-16`."""


def quick_commands() -> list[str]:
    found = {shlex.join(command.words): None for command in all_commands() if command.complete}
    return [line for line in found if any(re.fullmatch(quick, line) for quick in QUICK) and "$(" not in line]


@pytest.mark.process
@pytest.mark.timeout(1800)  # a minute of CPU time for a whole run, and for twenty programs that start
def test_quick_commands_run(reproduced: Checkout) -> None:
    """One test for all, since they share one finished run."""
    reproduced.git("branch", "--force", "rank-16")
    problems = []
    lines = quick_commands()
    assert len(lines) >= 5, lines
    for line in lines:
        words = shlex.split(line)
        words[:1] = {
            "lora-dag": [sys.executable, "-m", "lora_dag"],
            "dvc": [sys.executable, "-m", "dvc"],
            "snakemake": [sys.executable, "-m", "snakemake", "--cores", "1"],
        }[words[0]]
        done = reproduced.run(*words, check=False)
        if done.returncode:
            problems.append(f"{line}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-600:]}")
    fail(problems, "commands of the pages that fail")
