import importlib.util
import sys

if sys.platform == "win32" or importlib.util.find_spec("fcntl") is None:  # for file locks
    print(
        "error: lora-dag needs Linux or macOS; on Windows, run it in WSL2: `wsl --install` [unsupported-system]",
        file=sys.stderr,
    )
    sys.exit(2)

from lora_dag.core import console  # after the line for Windows

if sys.argv[:1] == ["-m"]:  # so Python names a module while it looks for it
    console.handle_interrupts()  # Ctrl-C while a stage imports its packages is one line, too
