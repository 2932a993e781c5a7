"""What makes two runs of a command the same, and what differs where they are not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first value of `now` that is another one in `before`, in words; "" if none is."""
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
    """The first value under the key `at` that is another one now, with both; "" if none is."""
    if isinstance(now, dict) and isinstance(before, dict):
        names = sorted(now.keys() | before.keys())
        return next((found for name in names if (found := difference(before.get(name), now.get(name), at=f"{at}.{name}"))), "")
    return "" if before == now else f"{at.lstrip('.')} ({json.dumps(before)} there, {json.dumps(now)} here)"


def all_differences(before: Any, now: Any, *, at: str = "") -> list[str]:
    """Every value that is another one now, by its key, with both."""
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
