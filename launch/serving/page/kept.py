"""Images to change, kept for the tabs that sent them: a tab sends an image once, and then names it by its key."""

from __future__ import annotations

import threading
from collections import OrderedDict

_KEPT = 500_000_000  # characters of all images, which are in base64


class Forgotten(ValueError):
    """An image that a tab names is not kept any more."""


class KeptImages:
    """The newest image of each tab, in base64. The least recently used are dropped when they need too much memory."""

    def __init__(self) -> None:
        self._images: OrderedDict[str, tuple[str, str]] = OrderedDict()  # key and image, by the session of the tab
        self._lock = threading.Lock()

    def image(self, session: str, *, key: str | None, sent: str | None) -> str | None:
        """The image of a request, None if it has none. sent: the image, if it came with the request.

        Raises Forgotten if the tab has to send it again.
        """
        with self._lock:
            kept_key, image = self._images.pop(session, ("", ""))
            if not key:
                return None
            if sent:
                image = sent
            elif kept_key != key:
                raise Forgotten("the server does not have the image any more: press Draw again")
            self._images[session] = key, image
            while len(self._images) > 1 and sum(len(each) for _, each in self._images.values()) > _KEPT:
                self._images.popitem(last=False)
            return image

    def drop(self, session: str) -> None:
        """Forget the image of a tab that is closed."""
        with self._lock:
            self._images.pop(session, None)
