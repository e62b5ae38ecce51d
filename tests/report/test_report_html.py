"""reports/report.html: report.md with sliders, what this machine took, and what differs from the last commit."""

from __future__ import annotations

import base64
import io
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from lora_dag.artifacts import metrics
from lora_dag.artifacts.lineage import save as save_lineage
from lora_dag.core.console import UserError
from lora_dag.core.files import sha256_file, write_json
from lora_dag.pages.sheets import sheet
from stages.report.html_page import duration
from tests.helpers.browser import CHROMIUM, browser
from tests.helpers.reports import LINEAGE, MADE, MEASURED, write_reports
from tests.helpers.workspace import Workspace

EVIL = "</option><script>document.title = 'owned'</script>"
COLORS = {"red apple": ("red", "darkred", "black"), EVIL: ("blue", "navy", "gray")}
ENVIRONMENT = {"device": "cpu AVX512", "num_threads": 1}


@pytest.fixture
def reports(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With two prompts, drawn by the base and at two scales; loss.png is left to other tests."""
    folder = workspace.path / "reports"
    write_reports(folder)
    asked = LINEAGE["validate"] | {"prompts": list(COLORS), "scales": [0.5, 1.0]}
    save_lineage(folder / "validate" / "lineage.json", LINEAGE | {"validate": asked, "sheet": {"cell": 64}})
    rows = [[Image.new("RGB", (64, 64), color) for color in colors] for colors in COLORS.values()]
    sheet(rows, list(COLORS), ["base", "x 0.5", "adapter"], 64).save(folder / "samples.png")
    monkeypatch.setattr("stages.report.__main__.plot_losses", lambda _, path: Image.new("RGB", (8, 8)).save(path))
    return folder


def written(workspace: Workspace) -> str:
    workspace.run("report")
    return (workspace.path / "reports" / "report.html").read_text(encoding="utf-8")


def test_sliders_show_the_base_and_the_adapter_of_each_prompt(workspace: Workspace, reports: Path) -> None:
    page = written(workspace)
    sliders = re.findall(r'<figure class="slider">(.*?)</figure>', page, re.DOTALL)
    found = []
    for slider in sliders:
        images = [base64.b64decode(text) for text in re.findall(r"base64,([^\"]+)", slider)]
        found.append([Image.open(io.BytesIO(data)).getpixel((32, 32)) for data in images])
    assert found == [[(255, 0, 0), (0, 0, 0)], [(0, 0, 255), (128, 128, 128)]]  # scale 1, and not 0.5
    assert page.count("<script>") == 1 and "<option>2. &lt;/option&gt;&lt;script&gt;" in page


FIGURES = {"train": Path("reports/train/metrics.json"), "validate": Path("reports/metrics.json")}


def test_it_says_what_report_md_says(workspace: Workspace, reports: Path) -> None:
    page = written(workspace)
    text = (reports / "report.md").read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert re.findall(r"<h[123]>(.*?)</h[123]>", page) == headings and len(headings) > 6
    assert page.count("<tr>") == len(re.findall(r"^\|(?! :?-)", text, re.MULTILINE))
    assert "Measured on this machine" not in page and "Compared with commit" not in page


def test_what_a_machine_took_stands_in_the_html_alone(workspace: Workspace, reports: Path) -> None:
    before = written(workspace), (reports / "report.md").read_bytes()
    of = {stage: {"of": sha256_file(path)} for stage, path in FIGURES.items()}
    run = of["train"] | {
        "environment": ENVIRONMENT,
        "images_per_second": 50.4,
        "resumed_from_step": 0,
        "seconds": 127.0,
    }
    write_json(reports / "train" / "run.json", run)
    other = {"environment": ENVIRONMENT, "peak_memory_gb": 1.234, "seconds": 42}
    write_json(reports / "validate" / "run.json", of["validate"] | other)
    page = re.sub(r"</td>\s*<td[^>]*>", " | ", written(workspace))
    assert before[0] != page and (reports / "report.md").read_bytes() == before[1]
    for words in (
        "Images per second | 50.4 | <",
        "Wall time | 2 min 07 s | 42 s<",
        "Peak memory |  | 1.23 GB<",
        "Device | cpu AVX512, 1 thread | cpu AVX512, 1 thread<",
    ):
        assert words in page
    assert "Resumed" not in page and "of the GPU" not in page
    write_json(reports / "train" / "run.json", run | {"of": "0" * 64})  # DVC restored another run's figures since
    assert "2 min 07 s" not in written(workspace)


def test_report_names_the_stage_of_a_damaged_run_json(workspace: Workspace, reports: Path) -> None:
    write_json(reports / "train" / "run.json", [])
    with pytest.raises(UserError) as error:
        workspace.run("report")
    (problem,) = error.value.problems
    assert problem.startswith("reports/train/run.json: ") and "`python -m stages.train`" in problem


@pytest.mark.parametrize(("seconds", "words"), [(59.6, "1 min 00 s"), (5, "5 s"), (3661, "1 h 01 min")])
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_page_lists_differences_from_the_last_commit(workspace: Workspace, reports: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("add", "reports")
    git("commit", "--quiet", "-m", "Reports")
    start = f"<p>Compared with commit {git('rev-parse', '--short', 'HEAD')}: "
    assert start + "same settings, images, base and packages.</p>" in written(workspace)
    lora = {"rank": 16, "target_modules": ["to_q"]}
    save_lineage(reports / "export" / "lineage.json", MADE | {"lora": lora, "images": "3" * 64})
    metrics.save(reports / "metrics.json", MEASURED | {"val.loss": 0.085})
    page = re.sub("</?code>", "`", written(workspace))
    assert start + "`lora.rank` `8` → `16`, images changed. Result: held-out loss 0.0900 → 0.0850.</p>" in page
    metrics.save(reports / "metrics.json", MEASURED | {"val.table": "f" * 16})
    assert "images changed. Result: the held-out tables differ.</p>" in written(workspace)
    git("rm", "--quiet", "--cached", "reports/metrics.json")
    git("commit", "--quiet", "-m", "No metrics")
    assert "Compared" not in written(workspace)
    assert "Compared" not in (reports / "report.md").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_in_a_browser_another_prompt_is_chosen_by_keys(workspace: Workspace, reports: Path, tmp_path: Path) -> None:
    written(workspace)
    shown = "[...document.querySelectorAll('.slider')].map(e => e.offsetHeight > 0)"
    with browser(tmp_path / "profile") as page:
        page.open(reports / "report.html", width=390)
        assert page.evaluate(shown) == [True, False]
        page.evaluate("document.querySelector('select').focus()")
        page.press("ArrowDown")
        assert page.evaluate(shown) == [False, True]
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.requests() == [] and page.complaints() == [] and page.evaluate("document.title") == "Ink icons"
