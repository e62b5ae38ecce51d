"""Read-only git commands in the repository of the current folder."""

from __future__ import annotations

import subprocess


def git(*arguments: str, timeout: float | None = None) -> bytes | None:
    """Return the standard output of a git command.

    Args:
        timeout: seconds until the command is given up.

    Returns:
        None if git fails (no such repository, commit or file), is not installed, or takes too long.
    """
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
