"""Libraries kept from talking between a stage's own lines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


def disable_progress_bars() -> None:
    """No "Loading weights" bars of diffusers and transformers."""
    from diffusers.utils import logging as of_diffusers  # no attribute of `diffusers.utils` before more is imported
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Errors alone, for calls whose warnings are known to mean nothing here."""
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
def while_loading() -> Iterator[None]:
    """No warnings while a file is loaded: the comparison that follows says more."""
    import warnings

    from peft.utils.warning import PeftWarning

    with warnings.catch_warnings(), no_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, for names that PEFT looks at
        yield
