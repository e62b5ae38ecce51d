"""A Slurm of two nodes on one machine for the tests: any Debian or Ubuntu, a container too; no systemd, no slurmdbd.

Configuration, keys, sockets, state and logs lie in one folder. /etc/slurm gets links to the configuration, since the
plugin hides SLURM_CONF from its jobs; where a configuration is there already, nothing is done.

Run: ``python -m tests.helpers.slurm [--install] [COMMAND ...]`` as root starts it, runs
tests/dag/test_slurm.py or the command, and tears it down again.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
PLUGIN = "snakemake_executor_plugin_slurm"
ETC = Path("/etc/slurm")
NODES = ("try-1", "try-2")
PATIENCE = 60  # seconds for them to come up

# CPUs, memory (MB) and GPUs are said, not found: what is tried is what jobs ask for. MinJobAge: how long squeue tells
# of ended jobs. Without slurmdbd there is no accounting.
CONFIGURATION = """\
ClusterName=lora-dag
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/slurmctld
SlurmdSpoolDir={folder}/slurmd-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
MinJobAge=3600
GresTypes=gpu
NodeName=try-1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs=4 RealMemory=64000 Gres=gpu:4 State=UNKNOWN
NodeName=try-2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second} CPUs=4 RealMemory=64000 Gres=gpu:4 State=UNKNOWN
PartitionName=try Nodes=try-1,try-2 Default=YES MaxTime=INFINITE State=UP
"""
GPUS = "".join(f"NodeName=try-[1-2] Name=gpu File=/dev/{name}\n" for name in ("null", "zero", "full", "random"))


def missing() -> str | None:
    """Why no Slurm can be started here, or None."""
    if os.name != "posix" or os.geteuid() != 0:
        return "slurmd wants root"
    if programs := [name for name in ("munged", "mungekey", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]:
        return f"{', '.join(programs)} not found: apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
    if (ETC / "slurm.conf").exists() and "ClusterName=lora-dag\n" not in (ETC / "slurm.conf").read_text():
        return f"{ETC}/slurm.conf: a Slurm is configured here already, and stays as it is"
    if importlib.util.find_spec(PLUGIN) is None:
        return f"{PLUGIN} not found: pip install 'lora-dag[slurm]'"
    return None


class Slurm:
    """Inside ``with``, it answers sbatch, squeue and scontrol."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        self.folder.chmod(0o755)
        (self.folder / "slurmctld").mkdir()
        places = {"folder": self.folder} | {name: free_port() for name in ("controller", "first", "second")}
        texts = {"slurm.conf": CONFIGURATION.format(**places), "gres.conf": GPUS}
        try:
            for name, text in texts.items():
                (self.folder / name).write_text(text)
                (ETC / name).unlink(missing_ok=True)  # of a try that was killed
                (ETC / name).symlink_to(self.folder / name)
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Raises AssertionError: the nodes did not come up; with the daemons' last lines."""
        key = self.folder / "munge.key"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
        own = {"key-file": key, "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        options = [f"--{name}={self.folder / value}" for name, value in (own | {"seed-file": "munge.seed"}).items()]
        self.daemon("munged", "--foreground", "--force", *options)
        self.wait(lambda: (self.folder / "munge.socket").exists())
        self.daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.daemon("slurmd", "-D", "-N", node)
        self.wait(lambda: self.ask("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * len(NODES))

    def daemon(self, *words: str) -> None:
        """Start one that the kernel ends should this process be killed."""
        command = ["setpriv", "--pdeathsig", "TERM", *words]
        with (self.folder / f"{words[0]}-{len(self.daemons)}.out").open("wb") as output:
            self.daemons.append(subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True))

    def wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            lines = [f"{path.name}: {path.read_text()[-500:]}" for path in sorted(self.folder.glob("*.out"))]
            assert time.monotonic() < deadline, "\n".join(lines)
            time.sleep(0.2)

    def ask(self, *words: str) -> str:
        """What one of Slurm's commands prints; nothing when it fails."""
        return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout

    def jobs(self) -> dict[str, str]:
        """Number -> comment, which the plugin fills with rule and wildcards, of what waits or runs."""
        lines = self.ask("squeue", "--noheader", "--format=%i %k").splitlines()
        return dict(line.split(maxsplit=1) for line in lines if " " in line)

    def stop(self) -> None:
        """End jobs and daemons, the last one first."""
        if self.daemons[1:]:
            self.ask("scancel", "--signal=KILL", "--full", *self.jobs())
        for process in reversed(self.daemons):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for name in ("slurm.conf", "gres.conf"):
            (ETC / name).unlink(missing_ok=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help=f"apt-get install {' '.join(PACKAGES)} first")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run there in place of the tests")
    args = parser.parse_args()
    if args.install:
        subprocess.run(["apt-get", "update"], check=True)
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES], check=True)
    reason = missing()
    if args.command and not shutil.which(args.command[0]):
        reason = (
            f'{args.command[0]} not found on PATH: with sudo, `sudo env PATH="$PATH" python -m tests.helpers.slurm ...`'
        )
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    if args.command:
        with tempfile.TemporaryDirectory() as folder, Slurm(Path(folder)):
            sys.exit(subprocess.run(args.command).returncode)
    tests = Path(__file__).parents[1] / "dag/test_slurm.py"
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", "-m", "slow", "-n0", "-s", "-v", tests]).returncode)


if __name__ == "__main__":
    main()
