"""The scripts of profiles/kubernetes by themselves, beside a stand-in of kubectl."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.helpers.workspace import REPOSITORY

SCRIPTS = REPOSITORY / "profiles/kubernetes"


def script(folder: Path, kubectl: str, name: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "kubectl").write_text(f"#!/bin/sh\n{kubectl}\n")
    (folder / "kubectl").chmod(0o755)
    environment |= {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([SCRIPTS / name, *words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("kubectl", "status"),
    [
        ("printf '%s ' $3", "running"),
        ("printf '%s Suspended' $3", "running"),
        ("printf '%s SuccessCriteriaMet Complete' $3", "success"),
        ("printf '%s FailureTarget' $3", "running"),
        ("printf '%s FailureTarget Failed' $3", "failed"),
        ("true", "failed"),  # deleted
        ("echo 'connection refused' >&2; exit 1", "running"),
    ],
)
def test_status_follows_the_conditions_of_the_job(tmp_path: Path, kubectl: str, status: str) -> None:
    done = script(tmp_path, kubectl, "status", "lora-dag-failed-1")
    assert done.stdout == f"{status}\n" and done.returncode == 0


def test_a_job_requests_the_resources_of_its_rule(tmp_path: Path) -> None:
    names = {"LORA_IMAGE": "image", "LORA_CLAIM": "claim", "LORA_MOUNT": "/mnt", "LORA_PARAMS": "runs/.params/a.yaml"}
    done = script(tmp_path, "cat > job.yaml; printf job-1", "submit", "4", "16000", "2", "480", "/jobs/a.sh", **names)
    assert (done.stdout, done.stderr) == ("job-1", "")
    spec = YAML(typ="safe").load(tmp_path / "job.yaml")["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["activeDeadlineSeconds"] == 480 * 60 and spec["backoffLimit"] == 0
    assert container["resources"]["requests"] == {"cpu": "4", "memory": "16000M"}
    assert container["resources"]["limits"] == {"memory": "16000M", "nvidia.com/gpu": "2"}
    assert container["command"] == ["sh", "/jobs/a.sh"] and container["workingDir"] == str(tmp_path)
    assert container["env"] == [{"name": "LORA_PARAMS", "value": "runs/.params/a.yaml"}]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "claim"}


def test_a_job_without_an_image_is_not_submitted(tmp_path: Path) -> None:
    done = script(tmp_path, "touch asked", "submit", "4", "16000", "2", "480", "/jobs/a.sh")
    assert done.returncode and "LORA_IMAGE: the image to run" in done.stderr
