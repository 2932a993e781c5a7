"""The first import of the fork server, before numpy and torch: workers inherit one thread each and the filter of foreign warnings."""

import os

from pipeline.foreign_warnings import hide_if_asked
from pipeline.workers.process import ONE_THREAD

os.environ.update(ONE_THREAD)
hide_if_asked()
