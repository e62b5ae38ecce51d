import importlib.util
import sys

if sys.platform == "win32" or importlib.util.find_spec("fcntl") is None:  # for file locks
    print(
        "error: lora-dag needs Linux or macOS; on Windows, run it in WSL2: `wsl --install` [unsupported-system]",
        file=sys.stderr,
    )
    sys.exit(2)

if sys.version_info < (3, 11) or importlib.util.find_spec("pydantic") is None:
    print(
        f"error: {sys.executable}: Python {sys.version.split()[0]} is too old, or lacks the packages of lora-dag. "
        "Python 3.11 with them is expected. Run `. .venv/bin/activate`, which README.md makes. [packages-missing]",
        file=sys.stderr,
    )
    sys.exit(2)

from lora_dag.core import console  # after the lines for Windows and for another Python

if sys.argv[:1] == ["-m"]:  # so Python names a module while it looks for it
    console.handle_interrupts()  # Ctrl-C while a stage imports its packages is one line, too
