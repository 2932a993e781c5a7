"""`tim doctor` on this machine."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from launch.cli import main
from launch.hardware import environment


def test_every_part_is_examined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--run-dir", str(tmp_path / "runs"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    findings = {each["name"]: each for each in report["findings"]}
    assert {"versions", "network", "attention bfloat16", "attention float32", "compiler", "open files", "disk"} <= findings.keys()
    assert report["warnings"] == sum(each["status"] == "warning" for each in report["findings"])
    assert all(each["remedy"] for each in report["findings"] if each["status"] == "warning")
    assert "flash needs cuda, not cpu" in findings["attention float32"]["detail"] or "cuda" in findings["attention float32"]["detail"]
    assert str(tmp_path) in findings["disk"]["detail"]
    assert not (tmp_path / "runs").exists()


def test_a_low_limit_is_a_warning_with_a_remedy(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, limits[1]))
    try:
        finding = next(each for each in environment.examine(tmp_path) if each.name == "open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (finding.status, finding.detail) == ("warning", "limit 1,000")
    assert "ulimit -n" in finding.remedy


def test_wrong_layouts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--nnodes", "2"], ["--nnodes", "2", "--rdzv-endpoint", "host"]):
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--nodes", *arguments])
        assert ended.value.code == 2
        assert "HOST:PORT" in capsys.readouterr().err
