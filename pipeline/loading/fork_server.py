"""Imports of the readers' fork server. Hides warnings of other libraries first; the readers inherit both."""

from pipeline.foreign_warnings import hide_if_asked

hide_if_asked()

import pipeline.loading.pack_reader  # noqa: E402, F401
