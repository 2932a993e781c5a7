"""The log file of a rank."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from pathlib import Path

import pytest

from launch.logs.rank_log import RankLog, log_path


@pytest.mark.filterwarnings("default", "ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_lines_warnings_records_and_tracebacks_are_kept_over_starts(tmp_path: Path) -> None:
    log = RankLog()
    with log.opened(tmp_path, rank=3, ranks=4):
        log.line("saved it\nand more")
        warnings.warn("look out", UserWarning, stacklevel=1)
        logging.getLogger("some.library").warning("it is %s", "late")
        logging.getLogger("some.library").info("chatter")
        thread = threading.Thread(target=lambda: [][1], name="worker")
        thread.start()
        thread.join()
    with pytest.raises(ZeroDivisionError), log.opened(tmp_path, rank=3, ranks=2):
        print(1 / 0)
    with pytest.raises(SystemExit), log.opened(tmp_path, rank=3, ranks=2):
        raise SystemExit(75)
    log.line("afterwards")
    logging.getLogger("some.library").warning("afterwards")

    lines = log_path(tmp_path, 3).read_text().splitlines()
    assert log_path(tmp_path, 3) == tmp_path / "logs" / "rank-00003.log"
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    texts = [line[20:] for line in lines]
    starts = [text for text in texts if text.startswith("---- start: rank 3 of ")]
    assert [start.split()[5] for start in starts] == ["4,", "2,", "2,"]
    assert texts[1:3] == ["saved it", "and more"]
    assert any(text.endswith("UserWarning: look out") for text in texts)
    assert "WARNING some.library: it is late" in texts
    assert "IndexError: list index out of range" in texts
    assert texts.index("end: complete") < texts.index("ZeroDivisionError: division by zero") < texts.index("end: exit code 75")
    assert not [text for text in texts if "chatter" in text or "afterwards" in text]


def test_names_that_are_not_unicode_do_not_end_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RankLog()
    with log.opened(tmp_path, rank=0, ranks=1):
        log.line("warning: caf\udce9.jpg is damaged")
        log.line("two")
    texts = [line[20:] for line in log_path(tmp_path, 0).read_text().splitlines()]
    assert texts[1:] == ["warning: caf\\udce9.jpg is damaged", "two", "end: complete"]
    assert capsys.readouterr().err == ""


def test_a_full_disk_ends_the_log_and_not_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-00000.log").symlink_to("/dev/full")
    log = RankLog()
    with log.opened(tmp_path, rank=0, ranks=1):
        log.line("one")
        log.line("two")
    assert capsys.readouterr().err.count("rank-00000.log ends here: No space left on device") == 1
