"""Two machines on one: network namespaces that a virtual cable joins. Needs the rights of root and the command `ip`."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESSES = ("10.197.31.1", "10.197.31.2")  # of machine 0 and 1
_CLONE_NEWNET = 0x40000000


@contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    """Yields the names of the namespaces.

    Raises:
        RuntimeError: this machine does not permit them.
    """
    if shutil.which("ip") is None:
        raise RuntimeError("no command `ip` (iproute2)")
    names = f"tim{os.getpid()}-0", f"tim{os.getpid()}-1"
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for interface in ("lo", "cable"):
                _ip("-n", name, "link", "set", interface, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)


def enter(namespace: str) -> None:
    """Move this thread, and what it starts, into a namespace."""
    with Path("/run/netns", namespace).open() as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {namespace}")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
