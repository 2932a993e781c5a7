"""What the fork server of the readers imports, with the warnings of other libraries hidden first: the readers inherit both."""

from pipeline.foreign_warnings import hide_if_asked

hide_if_asked()

import pipeline.loading.pack_reader  # noqa: E402, F401
