"""DVC remotes by their own protocols: push, clone elsewhere, pull, and nothing is left to run."""

from __future__ import annotations

import copy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.helpers.checkout import Checkout

pytestmark = pytest.mark.slow
Remote = dict[str, str]
"""``url``, and what else `dvc remote modify --local` is told."""


@contextmanager
def local(folder: Path) -> Iterator[Remote]:
    yield {"url": str(folder / "remote")}


@contextmanager
def s3(folder: Path) -> Iterator[Remote]:
    """moto's server: S3's HTTP interface, in a process of its own."""
    pytest.importorskip("dvc_s3", reason="needs pip install 'dvc[s3]'")
    pytest.importorskip("moto.server", reason="needs pip install 'moto[server]'")
    import boto3

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with serving(command, port):
        keys = {"access_key_id": "someone", "secret_access_key": "secret"}
        remote = {
            "url": "s3://bucket/lora-dag",
            "endpointurl": f"http://127.0.0.1:{port}",
            "region": "us-east-1",
        } | keys
        names = {f"aws_{name}": value for name, value in keys.items()}
        client = boto3.client("s3", endpoint_url=remote["endpointurl"], region_name=remote["region"], **names)
        client.create_bucket(Bucket="bucket")
        yield remote
        assert client.list_objects_v2(Bucket="bucket", Prefix="lora-dag/files/md5/")["KeyCount"] > 10


SSH_SERVER = """
import asyncio, sys, asyncssh
class Server(asyncssh.SSHServer):
    def begin_auth(self, username): return True
    def password_auth_supported(self): return True
    def validate_password(self, username, password): return (username, password) == ("someone", "secret")
async def main():
    key = asyncssh.generate_private_key("ssh-ed25519")
    await asyncssh.listen("127.0.0.1", int(sys.argv[1]), server_factory=Server, server_host_keys=[key],
                          process_factory=lambda process: process.exit(1), sftp_factory=True)
    await asyncio.Future()
asyncio.run(main())
"""


@contextmanager
def ssh(folder: Path) -> Iterator[Remote]:
    """asyncssh's server: SFTP over SSH with a password."""
    pytest.importorskip("dvc_ssh", reason="needs pip install 'dvc[ssh]'")
    port = free_port()
    with serving([sys.executable, "-c", SSH_SERVER, str(port)], port):
        yield {"url": f"ssh://someone@127.0.0.1:{port}{folder}/remote", "password": "secret"}
    assert (folder / "remote/files/md5").is_dir()


@contextmanager
def serving(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait(lambda: answers(port))
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def pushing(reproduced: Checkout) -> Iterator[Checkout]:
    """The same for each remote: its settings are taken out again."""
    before = reproduced.git("rev-parse", "HEAD").strip()
    yield reproduced
    reproduced.git("reset", "--quiet", "--hard", before)
    (reproduced.path / ".dvc/config.local").unlink(missing_ok=True)


@pytest.fixture(params=[local, s3, ssh])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Remote]:
    with ExitStack() as stack:
        yield stack.enter_context(request.param(tmp_path))


def test_a_clone_pulls_what_was_pushed_and_has_nothing_to_run(
    pushing: Checkout, remote: Remote, tmp_path: Path
) -> None:
    clone = copy.copy(pushing)
    clone.path = tmp_path / "clone"
    pushing.dvc("remote", "add", "--force", "--default", "ours", remote["url"])
    pushing.git("commit", "--quiet", "--message", "remote", ".dvc/config")
    tell(pushing, remote)
    assert "pushed" in pushing.dvc("push", "--run-cache")

    pushing.run("git", "clone", "--quiet", str(pushing.path), str(clone.path))
    tell(clone, remote)
    clone.dvc("pull", "--run-cache")
    assert "Data and pipelines are up to date." in clone.dvc("repro")
    assert "Data and pipelines are up to date." in clone.dvc("status")
    assert clone.adapter() == pushing.adapter()
    assert clone.git("status", "--porcelain") == ""


def tell(checkout: Checkout, remote: Remote) -> None:
    """Addresses and secrets go to .dvc/config.local, which git does not see."""
    for name, value in remote.items():
        if name != "url":
            checkout.dvc("remote", "modify", "--local", "ours", name, value)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)
