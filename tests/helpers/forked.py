"""A child of the test's process, to be killed in the middle of its work, without the 5 s that a new one imports for."""

from __future__ import annotations

import os
from collections.abc import Callable


def exit_code(work: Callable[[], object]) -> int:
    """Of a fork that does the work: 0, 1 after an exception, -N where signal N ended it."""
    child = os.fork()
    if not child:
        failed = True
        try:
            work()
            failed = False
        finally:
            os._exit(failed)  # nothing of pytest's own ends twice
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
