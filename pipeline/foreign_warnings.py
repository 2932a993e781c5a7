"""Hide deprecation warnings of other libraries, which only their developers can act on.

A command calls `hide_foreign_warnings` first. Its workers find `HIDDEN` in their environment and call `hide_if_asked`: PYTHONWARNINGS
cannot do this, because its module field is one exact name. User filters (PYTHONWARNINGS, `-W`) take precedence.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

HIDDEN = "TIM_HIDE_WARNINGS"
OWN = ("configs", "dataprep", "launch", "pipeline", "tim", "__main__", "__mp_main__")
_FOREIGN_MODULE = rf"(?!(?:{'|'.join(OWN)})(?:\.|$))"  # matched at the start of the module name of a warning
_CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, SyntaxWarning)
# diffusers imports bitsandbytes, which misses kernels that a CPU does not need, and warns of keys that it wrote itself into config.json.
_NOISY_LOGGERS = ("bitsandbytes", "diffusers.configuration_utils")
_NATIVE_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"  # of torch's C++ code


def hide_foreign_warnings() -> None:
    """Hide warnings of other modules that users cannot act on, in this process and its workers."""
    os.environ[HIDDEN] = "1"
    os.environ.setdefault(_NATIVE_LOG_LEVEL, "ERROR")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they also appear for cached files
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in _CATEGORIES:
        warnings.filterwarnings("ignore", category=category, module=_FOREIGN_MODULE, append=True)


def show_all_warnings() -> None:
    """Show the warnings of all modules, in this process and its workers. User filters take precedence."""
    os.environ.pop(HIDDEN, None)
    if not sys.warnoptions:
        os.environ["PYTHONWARNINGS"] = "default"
        warnings.simplefilter("default")


def hide_if_asked() -> None:
    """Hide warnings if the command that started this worker does."""
    if HIDDEN in os.environ:
        hide_foreign_warnings()
