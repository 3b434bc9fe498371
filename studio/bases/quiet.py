"""Keeps the libraries beneath from talking to the user: progress bars of loading, notices, warnings of xformers.

Errors still come through, and so do the bars of a download, which may take minutes.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from functools import lru_cache


@lru_cache(maxsize=1)
def quiet_libraries() -> None:
    """Call it before diffusers is imported. A verbosity that the user set in the environment is left alone."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("xformers").setLevel(logging.ERROR)
    # diffusers tells authors of models, by FutureWarning, how their configuration should look.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers)\..*")
    for library in ("transformers", "diffusers"):
        _quiet(library)


def _quiet(library: str) -> None:
    imported_before = library in sys.modules
    talk = __import__(f"{library}.utils.logging", fromlist=["logging"])
    talk.disable_progress_bar()
    if imported_before and os.environ[f"{library.upper()}_VERBOSITY"] == "error":
        talk.set_verbosity_error()
