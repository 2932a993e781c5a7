"""Variable-length attention over packs."""

from tim.attention.dispatch import attention, choose_backend

__all__ = ["attention", "choose_backend"]
