"""Warnings of other libraries: deprecations that only their developers can act on are kept off the screen of our commands.

A command calls `hide_foreign_warnings` first. Workers that it starts find `HIDDEN` in their environment and call `hide_if_asked`:
PYTHONWARNINGS alone cannot do it, because its module field is one exact name. The filters go behind the user's own (PYTHONWARNINGS, `-W`).
"""

from __future__ import annotations

import os
import sys
import warnings

HIDDEN = "TIM_HIDE_WARNINGS"
OWN = ("configs", "dataprep", "launch", "pipeline", "tim", "__main__", "__mp_main__")
_FOREIGN_MODULE = rf"(?!(?:{'|'.join(OWN)})(?:\.|$))"  # matched at the start of the name of the module that a warning is about
_CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, SyntaxWarning)
_NATIVE_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"  # of torch's C++ code


def hide_foreign_warnings() -> None:
    """Hide deprecations of modules that are not ours, in this process and in the workers that it starts."""
    os.environ[HIDDEN] = "1"
    os.environ.setdefault(_NATIVE_LOG_LEVEL, "ERROR")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they also report on files that lie here already
    for category in _CATEGORIES:
        warnings.filterwarnings("ignore", category=category, module=_FOREIGN_MODULE, append=True)


def show_all_warnings() -> None:
    """Show the warnings of all modules, in this process and in its workers; where the user has filters of their own, those decide."""
    os.environ.pop(HIDDEN, None)
    if not sys.warnoptions:
        os.environ["PYTHONWARNINGS"] = "default"
        warnings.simplefilter("default")


def hide_if_asked() -> None:
    """Hide what the command that started this worker hides."""
    if HIDDEN in os.environ:
        hide_foreign_warnings()
