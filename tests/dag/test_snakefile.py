"""Jobs that Snakemake runs, on stages that only write file names: reruns, hazards, kills, profiles."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from lora_dag.core.params import read_yaml
from tests.helpers.checkout import Checkout
from tests.helpers.errors import assert_line
from tests.helpers.workspace import make_image

AFTER_TRAIN = {"train", "validate", "export", "report"}
ALL = {"prepare", "cache_latents", *AFTER_TRAIN}

# Takes the place of `python` on PATH: writes what a stage would write, with what it was asked as content.
STUB = """#!{python}
import os, pathlib, sys, time
FILES = {{
    "prepared": ["manifest.jsonl", "dataset.json"],
    "dataset-reports": ["metrics.json", "contact.png", "images.csv"],
    "latents": ["manifest.json"],
    "latents-reports": ["metrics.json"],
    "adapter": ["adapter.json"],
    "train-reports": ["metrics.json", "loss.csv"],
    "export": ["diffusers/pytorch_lora_weights.safetensors", "peft/adapter_model.safetensors",
               "comfyui/ink-icons.safetensors"],
    "export-reports": ["metrics.json", "energy.csv", "lineage.json"],
}}
REPORTS = {{
    "validate": ["metrics.json", "samples.png", "progress.png", "validate/heldout.csv", "validate/curve.csv",
                 "validate/nearest.png", "validate/nearest.csv", "validate/lineage.json"],
    "report": ["headline.json", "report.md", "dataset.md", "model_card.md", "loss.png"],
}}
WRITES = {{"prepare": ["prepared", "dataset-reports"], "cache_latents": ["latents", "latents-reports"],
          "train": ["adapter", "train-reports"], "export": ["export", "export-reports"], "validate": [], "report": [],
          "leaderboard": []}}
if sys.argv[2] == "lora_dag":  # python -m lora_dag leaderboard
    sys.argv.pop(2)
stage = sys.argv[2].rpartition(".")[2]
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
with open("ran.txt", "a") as file:
    print(stage, *sys.argv[3:], file=file)
if os.environ.get("HANG") == stage:
    time.sleep(60)
if os.environ.get("FAIL") == stage:
    sys.exit("error: asked to fail")
if stage == "leaderboard":
    options["--reports"] = "reports/sweep"
    REPORTS[stage] = ["leaderboard.md", "leaderboard.csv", "leaderboard.png", "contact.png"]
names = [(f"--{{name}}", FILES[name]) for name in WRITES[stage]] + [("--reports", REPORTS.get(stage, []))]
for option, files in names:
    for name in files:
        path = pathlib.Path(options[option]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(sys.argv) + open(options["--params"]).read())
"""

# A stand-in of kubectl: a Job's script runs here, and its end is kept in a file.
KUBECTL = """#!/bin/sh
if [ "$1" = create ]; then
    cat > job.yaml && cat job.yaml >> jobs.yaml && name=job$(date +%N)
    script=$(sed -n 's/.*command: \\[sh, "\\(.*\\)"\\]/\\1/p' job.yaml)
    (sh "$script" && echo Complete || echo Failed) > $name.status 2> $name.log &
    printf %s $name
else
    printf "%s " $3 && tail -n 1 $3.status
fi
"""

# A stand-in of conda; it makes no environment.
CONDA = """#!/bin/sh
case "$1" in
info) echo '{{"conda_prefix": "{folder}", "platform": "linux-64"}}' ;;
--version) echo conda 24.9.2 ;;
config) echo '{{"get": {{"channel_priority": "strict"}}}}' ;;
esac
"""


class Stubbed:
    """A checkout where every stage takes a moment."""

    def __init__(self, checkout: Checkout, folder: Path) -> None:
        self.checkout, self.path, self.bin = checkout, checkout.path, folder
        folder.mkdir()
        (folder / "python").write_text(STUB.format(python=sys.executable))
        (folder / "python").chmod(0o755)
        self.environment = checkout.environment | {"PATH": f"{folder}{os.pathsep}{checkout.environment['PATH']}"}

    def snakemake(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "snakemake", "--cores", "2", *words]
        options = {"env": self.environment | environment, "capture_output": True, "text": True, "timeout": 120}
        return subprocess.run(command, cwd=self.path, **options)

    def plan(self, *words: str) -> dict[str, int]:
        """Rule -> jobs that would run."""
        done = self.snakemake("--dry-run", "--quiet", "rules", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        counts = re.findall(r"^(\w+)\s+(\d+)$", done.stdout + done.stderr, re.MULTILINE)
        return {name: int(count) for name, count in counts if name in ALL}

    def run(self, *words: str) -> str:
        done = self.snakemake(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def ran(self) -> list[str]:
        """The stages since the last call, with their options."""
        path = self.path / "ran.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture(scope="module")
def stubbed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Stubbed:
    """After a first run of everything, in a folder of a bigger repository; blanks and letters beyond ASCII."""
    folder = tmp_path_factory.mktemp("stubbed")
    top = folder / "dépôt 1"
    result = Stubbed(Checkout(top / "lora dag", tiny_base, top), folder / "bin")
    result.run()
    assert len(result.ran()) == 6
    return result


@pytest.fixture(autouse=True)
def put_back(stubbed: Stubbed) -> Iterator[None]:
    yield
    stubbed.checkout.git("checkout", "--quiet", "params.yaml")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("lora__rank", 4, AFTER_TRAIN),
        ("validate__seed", 1, {"validate", "report"}),
        ("export__push_to_hub", {"repo_id": "someone/icons", "private": True}, {"report"}),
        pytest.param("model__dtype", "bfloat16", ALL - {"prepare"}, marks=pytest.mark.slow),
        pytest.param("dataset__heldout_fraction", 0.4, ALL, marks=pytest.mark.slow),
        pytest.param("cache__batch_size", 3, ALL - {"prepare"}, marks=pytest.mark.slow),
        pytest.param("train__seed", 1, None, marks=pytest.mark.slow),  # a folder of its own
        pytest.param("train__num_steps", 6, AFTER_TRAIN, marks=pytest.mark.slow),
        pytest.param("export__seed", 1, {"export", "report"}, marks=pytest.mark.slow),
        pytest.param("report__title", "Another", {"report"}, marks=pytest.mark.slow),
        pytest.param("runtime__log_every_n_steps", 2, set(), marks=pytest.mark.slow),
        pytest.param("sweep__seeds", [0], set(), marks=pytest.mark.slow),
    ],
)
def test_a_change_reruns_the_same_stages_as_under_dvc(
    stubbed: Stubbed, key: str, value: object, expected: set[str] | None
) -> None:
    """The table of test_pipeline.py, for every section; of DVC's, cache may end early, where the bits are the same."""
    stubbed.checkout.set(**{key: value})
    assert set(stubbed.plan()) == (AFTER_TRAIN if expected is None else expected)


@pytest.mark.slow
def test_a_sweep_runs_shared_stages_once(stubbed: Stubbed) -> None:
    grid = "grid={lora.rank: [2, 4, 8], validate.guidance_scale: [1.5, 2.0]}"
    plan = stubbed.plan("--config", grid, "seeds=[0,1]", "datasets=[data/raw,data/other]")
    # prepare and cache_latents of data/raw are there
    assert plan == {"prepare": 1, "cache_latents": 1, "train": 12, "export": 12, "validate": 24, "report": 24}
    output = stubbed.run("--config", "grid={lora.rank: [2, 4], validate.guidance_scale: [1.5]}", "seeds=[0]")
    assert "sweep: 2 runs. Jobs: prepare 1, cache_latents 1, train 2" in output
    ran = stubbed.ran()
    assert sorted(line.partition(" ")[0] for line in ran) == sorted([*AFTER_TRAIN] * 2 + ["leaderboard"])
    (words,) = [line for line in ran if line.startswith("train") and "rank=4" in line]
    assert re.fullmatch(
        r"train --params runs/.params/\w+.yaml --set train.seed=0 --set lora.rank=4 --latents runs/raw/latents"
        r" --adapter runs/raw/rank-4-s0/adapter --train-reports runs/raw/rank-4-s0/reports/train",
        words,
    )


def test_a_crash_after_a_change_leaves_no_outdated_results(stubbed: Stubbed) -> None:
    stubbed.checkout.set(lora__rank=3)
    failed = stubbed.snakemake("--retries", "0", FAIL="train")
    assert failed.returncode != 0 and "asked to fail" in failed.stdout + failed.stderr
    assert set(stubbed.plan()) == AFTER_TRAIN  # only since rule all names the adapter: no parameter has changed since
    stubbed.checkout.git("checkout", "--quiet", "params.yaml")
    assert set(stubbed.plan()) == AFTER_TRAIN  # for the setting before, too: its adapter is gone
    stubbed.run()
    stubbed.ran()


def test_a_sweep_with_a_failed_run_has_a_leaderboard_too(stubbed: Stubbed) -> None:
    """The rule waits for every run; the parameters of the command have the sweep of the command line."""
    failed = stubbed.snakemake("--config", "seeds=[8,9]", "--retries", "0", FAIL="train")
    assert failed.returncode != 0
    (words,) = [line for line in stubbed.ran() if line.startswith("leaderboard")]
    (params,) = re.fullmatch(r"leaderboard --params (runs/.params/\w+.yaml)", words).groups()
    assert read_yaml(stubbed.path / params)["sweep"]["seeds"] == [8, 9]


TEXTS = ["a photo of ", "null", "3", "a fox: night", "yes", "1e-4", " #x", "it's $HOME `pwd`", "лиса 🦊", 'a\\b "c"']


def test_texts_on_the_command_line_reach_the_stages_as_written(stubbed: Stubbed) -> None:
    """Also those that YAML, a shell or Snakemake reads otherwise."""
    grid = f"grid={{dataset.caption_prefix: {json.dumps(TEXTS, ensure_ascii=False)}}}"
    stubbed.run("--config", grid, "seeds=[0]", "--until", "prepare")
    lines = stubbed.ran()
    options = [re.search("dataset.caption_prefix=(.*) --prepared", line)[1] for line in lines]
    assert sorted(YAML(typ="safe", pure=True).load(text) for text in options) == sorted(TEXTS)
    # a job on a cluster is given --config through a shell, which damages such texts; it reads the snapshot instead
    params, folder = re.search(r"--params (\S+) .* --prepared (\S+)", lines[0]).groups()
    words = ("--mode", "subprocess", "--config", "grid={lora.rank: [damaged]}", "--dry-run", f"{folder}/manifest.jsonl")
    assert stubbed.snakemake(*words, LORA_PARAMS=params).returncode == 0
    assert stubbed.snakemake(*words[2:]).returncode != 0


@pytest.mark.slow
def test_an_edited_image_is_noticed_and_a_touched_one_is_not(stubbed: Stubbed) -> None:
    path = stubbed.path / "data/raw/00.png"
    original = path.read_bytes()
    path.unlink()  # a link into DVC's cache
    path.write_bytes(original)
    assert stubbed.plan() == {}
    make_image(100).save(path)
    assert set(stubbed.plan()) == ALL
    path.write_bytes(original)
    assert stubbed.plan() == {}


@pytest.mark.slow
def test_edited_code_reruns_its_stage_and_a_comment_in_another_s_does_not(stubbed: Stubbed) -> None:
    path = stubbed.path / "stages/export/header.py"
    original = path.read_text()
    path.write_text(original + "\n# edited\n")
    assert set(stubbed.plan()) == {"export", "report"}
    path.write_text(original)
    assert stubbed.plan() == {}


def test_relock_accepts_edited_code_of_the_same_results_and_hides_no_other_change(stubbed: Stubbed) -> None:
    def relock(code: int = 0) -> str:
        done = stubbed.checkout.python("-m", "lora_dag", "relock", check=False)
        assert done.returncode == code, done.stderr
        return done.stdout

    path, number = stubbed.path / "lora_dag/core/console.py", stubbed.path / "stages/validate/__init__.py"
    original = path.read_text(), number.read_text()
    path.write_text(original[0] + "\n# edited\n")
    assert set(stubbed.plan()) == ALL
    assert "accepted    runs/: 3 files of train" in relock()
    assert stubbed.plan() == {}
    stubbed.checkout.set(export__seed=1)
    number.write_text("RESULTS = 2\n")
    path.write_text(original[0])
    said = relock(3)
    assert "must run    runs/: validate: RESULTS 1 → 2 (8 files). Run `snakemake`" in said
    assert "accepted    runs/: 3 files of train" in said
    assert set(stubbed.plan()) == {"validate", "export", "report"}
    stubbed.checkout.git("checkout", "--quiet", "params.yaml")
    number.write_text(original[1])
    relock()
    assert stubbed.plan() == {}
    lock = stubbed.path / ".snakemake/locks/0.input.lock"
    lock.touch()
    refused = stubbed.checkout.python("-m", "lora_dag", "relock", check=False)
    lock.unlink()
    assert refused.returncode == 2
    assert_line(refused.stderr, "snakemake-running", ".snakemake/locks", "`snakemake --unlock`")


@pytest.mark.slow
def test_parameters_edited_while_jobs_run_reach_none_of_them(stubbed: Stubbed) -> None:
    """Every job reads the copy that was made when the command started."""
    stubbed.checkout.set(report__title="One")
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--forcerun", "validate"]
    environment = stubbed.environment | {"HANG": "none"}
    process = subprocess.Popen(
        command, cwd=stubbed.path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait(lambda: (stubbed.path / "ran.txt").exists(), process)
    stubbed.checkout.set(report__title="Two")
    process.communicate(timeout=60)
    assert process.returncode == 0
    page = (stubbed.path / "runs/raw/default-s0/reports/report.md").read_text()
    assert "title: One" in page and "title: Two" not in page
    assert stubbed.plan() == {"report": 1}
    stubbed.checkout.git("checkout", "--quiet", "params.yaml")
    stubbed.run()
    stubbed.ran()


@pytest.mark.slow
def test_the_same_command_resumes_after_a_kill(stubbed: Stubbed) -> None:
    """After SIGKILL a lock and half a result stand; the first is named with its cure, the second made again."""
    words = ["--config", "grid={lora.rank: [5]}"]
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *words]
    environment = stubbed.environment | {"HANG": "train"}
    process = subprocess.Popen(command, cwd=stubbed.path, env=environment, start_new_session=True)
    wait(lambda: "train" in "".join(stubbed.ran()), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    locked = stubbed.snakemake(*words)
    assert locked.returncode != 0 and "--unlock" in locked.stdout + locked.stderr
    stubbed.run("--unlock")
    stubbed.run(*words)
    assert {line.partition(" ")[0] for line in stubbed.ran()} == AFTER_TRAIN


def wait(done: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if done():
            return
        assert process.poll() is None, "ended before its time"
        time.sleep(0.02)
    raise AssertionError("nothing happened")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["grid={lora.rnak: [4]}"],
            "params.yaml sweep.grid lora.rnak: unknown setting. Did you mean lora.rank",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["grid={lora.rank: [4, 0]}"],
            "lora.rank: got 0, but a value greater than or equal to 1",
            marks=pytest.mark.slow,
        ),
        (["ranks=4,8"], "--config ranks: unknown setting. Known settings: datasets, grid, rows, seeds, exclude"),
        (
            ["datasets=[data/nope]"],
            "data/nope: no such file or folder, or an empty folder. Correct the path, or run `dvc pull",
        ),
        pytest.param(["datasets=[.]"], ".: contains runs/", marks=pytest.mark.slow),
        pytest.param(
            ["grid={export.resized_ranks: [[9]]}"], "9 is not below the adapter's rank 2", marks=pytest.mark.slow
        ),
    ],
)
def test_a_sweep_is_refused_before_any_job(stubbed: Stubbed, words: list[str], message: str) -> None:
    done = stubbed.snakemake("--config", *words)
    assert done.returncode != 0 and message in done.stdout + done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and stubbed.ran() == []


def test_the_log_does_not_list_every_image(stubbed: Stubbed) -> None:
    done = stubbed.snakemake("--dry-run", "--forceall")
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "prepare: raw" in said and "cache_latents: raw/latents" in said
    assert "data/raw/03.png" not in said


@pytest.mark.parametrize(
    ("device", "threads", "gpus"), [("auto", 6, 2), pytest.param("cpu", 6, 0, marks=pytest.mark.slow)]
)
def test_each_process_gets_its_threads_and_its_gpu(stubbed: Stubbed, device: str, threads: int, gpus: int) -> None:
    stubbed.checkout.set(
        runtime__device=device,
        runtime__num_threads=3,
        runtime__num_processes=2,
        train__gradient_accumulation_steps=2,
    )
    done = stubbed.snakemake("--workflow-profile", "none", "--cores", "8", "--dry-run", "--forceall")
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = re.split(r"^rule ", done.stdout + done.stderr, flags=re.MULTILINE)
    (train,) = [job for job in jobs if job.startswith("train:")]
    assert f"threads: {threads}\n" in train and f"gpu={gpus}" in train.split()
    (validate,) = [job for job in jobs if job.startswith("validate:")]
    assert "threads: 3\n" in validate and f"gpu={gpus // 2}" in validate.split()


def test_several_machines_are_started_by_srun(stubbed: Stubbed, tmp_path: Path) -> None:
    stubbed.checkout.set(
        runtime__num_threads=3,
        runtime__num_processes=4,
        runtime__num_machines=2,
        train__gradient_accumulation_steps=4,
    )
    words = ("--workflow-profile", "none", "--cores", "8", "--dry-run", "--forceall", "-p")
    for name in ("bash", "sh", "git"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    path = f"{stubbed.bin}{os.pathsep}{tmp_path}"
    done = stubbed.snakemake(*words, PATH=path)
    assert done.returncode and "2 machines need Slurm. Use profiles/slurm, or set it to 1" in done.stdout + done.stderr
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    done = stubbed.snakemake(*words, PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    each = "--nodes=2 --ntasks-per-node=1 --cpus-per-task=6 --kill-on-bad-exit=1"
    assert f"Shell command: srun {each} profiles/slurm/torchrun 2 -m stages.train" in done.stdout + done.stderr


@pytest.mark.slow
def test_slurm_profile_asks_for_gpu_memory_and_time(stubbed: Stubbed) -> None:
    pytest.importorskip("snakemake_executor_plugin_slurm")
    stubbed.checkout.set(runtime__device="auto")
    words = ["--workflow-profile", "profiles/slurm", "--dry-run", "--forceall"]
    done = stubbed.snakemake(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout + done.stderr
    train = re.search(r"^rule train:.*?resources: ([^\n]+)", text, re.MULTILINE | re.DOTALL)
    assert train and {"gpu=1", "mem_mb=16000", "runtime=480"} <= set(train[1].split(", "))


@pytest.mark.slow
def test_kubernetes_profile_starts_a_job_per_stage_and_waits_for_it(stubbed: Stubbed) -> None:
    pytest.importorskip("snakemake_executor_plugin_cluster_generic")
    stubbed.checkout.set(runtime__device="auto")
    path = stubbed.bin / "kubectl"
    path.write_text(KUBECTL)
    path.chmod(0o755)
    words = ["--workflow-profile", "profiles/kubernetes", "--latency-wait", "2", "--config", "grid={lora.rank: [6]}"]
    done = stubbed.snakemake(*words, LORA_IMAGE="image", LORA_CLAIM="claim", LORA_MOUNT="/mnt")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.partition(" ")[0] for line in stubbed.ran()][0] == "train"
    train, *_ = YAML(typ="safe").load_all(
        (stubbed.path / "jobs.yaml").read_text().replace("apiVersion", "---\napiVersion")
    )
    pod = train["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "16000M", "nvidia.com/gpu": "1"}
    assert pod["containers"][0]["workingDir"] == str(stubbed.path)
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "claim"}
    assert train["spec"]["activeDeadlineSeconds"] == 480 * 60


@pytest.mark.slow
def test_conda_environment_has_the_locked_packages(stubbed: Stubbed, tmp_path: Path) -> None:
    """Snakemake copies the file to .snakemake/conda, and conda takes what pip is asked for from there."""
    files = {
        "bin/conda": CONDA.format(folder=tmp_path),
        "bin/activate": f"PATH={tmp_path}/activated:$PATH",
        "activated/python": f'#!/bin/sh\necho "$@" >> {tmp_path}/asked.txt; ls requirements.lock\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (stubbed.path / "requirements.lock").touch()
    words = ["--software-deployment-method", "conda", "--conda-create-envs-only", "--config", "seeds=[7]"]
    done = stubbed.snakemake(*words, PATH=f"{tmp_path}/bin{os.pathsep}{stubbed.environment['PATH']}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "asked.txt").read_text() == "-m pip install --requirement requirements.lock\n"


@pytest.mark.slow
def test_report_is_one_file_with_labels_and_nothing_from_the_network(stubbed: Stubbed) -> None:
    words = ["--config", "grid={lora.rank: [2, 3]}"]
    for name in ("samples", "progress", "loss"):  # images, not the stages' names
        for path in stubbed.path.glob(f"runs/raw/*/reports/{name}.png"):
            make_image(1).save(path)
    stubbed.run(*words)
    stubbed.run(*words, "--report", "runs/report.html")
    page = (stubbed.path / "runs/report.html").read_text(encoding="utf-8")
    for label in ('"dataset": "raw"', '"lora.rank": "2"', '"lora.rank": "3"', '"seed": "0"'):
        assert label in page
    assert not re.search(r"""(?:src|href)=["']https?://""", page.replace("https://snakemake", ""))
