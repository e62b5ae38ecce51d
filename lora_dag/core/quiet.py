"""Silence for libraries that print between the log lines of a stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


def disable_progress_bars() -> None:
    """Disable the "Loading weights" bars of diffusers and transformers."""
    from diffusers.utils import logging as of_diffusers  # `diffusers.utils.logging` exists only after more imports
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Show only errors of diffusers and transformers, for calls whose warnings are known to be irrelevant."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = [(logging, logging.get_verbosity()) for logging in (of_diffusers, of_transformers)]
    for logging, _ in before:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        for logging, verbosity in before:
            logging.set_verbosity(verbosity)


@contextlib.contextmanager
def without_loading_warnings() -> Iterator[None]:
    """Show no warnings while a file is loaded, as the loaded values are compared afterwards."""
    import warnings

    from peft.utils.warning import PeftWarning

    with warnings.catch_warnings(), without_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, for names that PEFT looks at
        yield
