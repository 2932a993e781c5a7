"""The first import of the fork server, before numpy and torch: workers inherit one thread each and the filter of foreign warnings."""

import os
import pickle
import sys
from types import TracebackType

from pipeline.foreign_warnings import hide_if_asked
from pipeline.workers.process import ONE_THREAD


def _print_unless_parent_died(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Print an error, unless it says that the parent died while it was starting this worker."""
    if not issubclass(kind, (EOFError, BrokenPipeError, ConnectionResetError, pickle.UnpicklingError)):
        sys.__excepthook__(kind, error, where)


os.environ.update(ONE_THREAD)
hide_if_asked()
sys.excepthook = _print_unless_parent_died
