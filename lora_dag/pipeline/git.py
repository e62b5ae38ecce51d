"""What git says of the repository around the current folder; nothing here changes it."""

from __future__ import annotations

import subprocess


def git(*arguments: str, timeout: float | None = None) -> bytes | None:
    """Standard output of a git command.

    Args:
        timeout: seconds to wait for an answer.

    Returns:
        None where git refuses (no repository, commit or file of that name), is not here, or is too slow.
    """
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
