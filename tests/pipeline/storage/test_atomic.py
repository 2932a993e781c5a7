"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest

from pipeline.storage.atomic import publish_text


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    publish_text(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # an error of the same kind
    try:
        with pytest.raises(OSError, match=r"file\.json") as caught:
            publish_text(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]
    assert path.read_text() == "old"
