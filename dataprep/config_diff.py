"""Differences between the settings of two runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the first value that differs between `before` and `now`; "" if none does."""
    for section in now:
        if section == "config":
            changed = difference(before.get(section), now[section], at="")
        elif section in ("sources", "against"):
            changed = _difference_of_lists(before.get(section, []), now[section], what=section)
        else:
            changed = difference(before.get(section), now[section], at=section)
        if changed:
            return changed
    return ""


def difference(before: Any, now: Any, *, at: str) -> str:
    """Describe the first value under the key `at` that differs, with both values; "" if none does."""
    if isinstance(now, dict) and isinstance(before, dict):
        names = sorted(now.keys() | before.keys())
        return next((found for name in names if (found := difference(before.get(name), now.get(name), at=f"{at}.{name}"))), "")
    return "" if before == now else f"{at.lstrip('.')} ({json.dumps(before)} there, {json.dumps(now)} here)"


def all_differences(before: Any, now: Any, *, at: str = "") -> list[str]:
    """Describe every value that differs: its key and both values."""
    if isinstance(now, dict) and isinstance(before, dict):
        names = sorted(now.keys() | before.keys())
        return [found for name in names for found in all_differences(before.get(name), now.get(name), at=f"{at}.{name}")]
    found = difference(before, now, at=at)
    return [found] if found else []


def _difference_of_lists(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], *, what: str) -> str:
    if list(before) == list(now):
        return ""
    there, here = ({entry["name"]: entry for entry in entries} for entries in (before, now))
    changes = [f"{name} is not in it" for name in here if name not in there]
    changes += [f"{name} is in it, too" for name in there if name not in here]
    changes += [f"{name} has changed since" for name in here if name in there and here[name] != there[name]]
    return f"{what} ({', '.join(changes) or 'their order'})"
