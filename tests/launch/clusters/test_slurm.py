"""`tim launch --slurm`: the script runs under stand-ins for Slurm's commands. A real Slurm runs it in `tests/distributed/test_slurm.py`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.clusters.requeue import requeue
from launch.clusters.slurm import Job, job_script, submit
from launch.config.run_sections import ClusterConfig
from tests.launch.clusters.conftest import add_command

ARGUMENTS = ["my file.yaml", "text.path=it's", "--max-restarts", "0"]
# Two nodes, one after the other; the environment that Slurm gives to each, and what it was told.
SRUN = """\
#!/bin/sh
echo "$@" >> srun.log
while [ "${1#-}" != "$1" ]; do shift; done
for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done
"""
SCONTROL = """\
#!/bin/sh
case $1 in show) printf 'node-1\\nnode-2\\n';; *) echo "$@" >> scontrol.log;; esac
"""


@pytest.fixture
def job(tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job in an empty folder; the program in place of Python writes its arguments."""
    monkeypatch.chdir(tmp_path)
    add_command(commands / "srun", SRUN)
    add_command(commands / "scontrol", SCONTROL)
    add_command(commands / "python", '#!/bin/sh\nprintf "%s|" "$@" >> ran; echo "$NCCL_DEBUG" >> ran; exit ${CODE:-0}\n')
    monkeypatch.setattr("sys.executable", str(commands / "python"))
    return Job(run_dir=tmp_path / "runs" / "my run", nnodes=2, nproc=8, workers=2, arguments=ARGUMENTS)


def run(script: str, **environment: str) -> int:
    """Run a script as Slurm does. Returns its exit code."""
    given = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "32"}
    return subprocess.run(["bash", "-c", script], env={**os.environ, **given, **environment}, check=False, timeout=60).returncode


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_every_node_runs_tim_launch_at_its_place(job: Job) -> None:
    cluster = ClusterConfig(setup=("export FROM_SETUP=1",), env={"NCCL_DEBUG": "IN FO"})
    assert run(job_script(job, cluster)) == 0
    shared = "-m|launch.cli|launch|my file.yaml|text.path=it's|--max-restarts|0|--nproc-per-node|8|--nnodes|2"
    place = [f"{shared}|--rdzv-endpoint|node-1:21234|--node-rank|{rank}|IN FO" for rank in range(2)]
    assert Path("ran").read_text().splitlines() == place
    assert Path("srun.log").read_text().startswith("--ntasks-per-node=1 --cpus-per-task=32 --wait=250 sh -c")


def test_the_script_asks_for_what_the_config_says(job: Job) -> None:
    cluster = ClusterConfig(partition="gpu", account="lab", time="24:00:00", options=("--qos=high", "--exclusive"))
    asked = options(job_script(job, cluster))
    assert {"--nodes=2", "--ntasks-per-node=1", "--gres=gpu:8", "--cpus-per-task=32", "--job-name='my run'"} <= set(asked)
    assert {"--partition=gpu", "--account=lab", "--time=24:00:00"} <= set(asked)
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append", f"--output='{job.folder}/%j.log'"} <= set(asked)
    assert asked[-2:] == ["--qos=high", "--exclusive"], "they replace ours"
    odd = options(job_script(replace(job, run_dir=Path("/runs/50%j it's")), cluster))
    assert [word for option in odd for word in shlex.split(option)][-6:-4] == [
        "--output=/runs/50%%j it's/slurm/%j.log",
        "--open-mode=append",
    ]
    asked = options(job_script(job, ClusterConfig(gres=None, cpus=96)))
    assert "--cpus-per-task=96" in asked
    assert not [option for option in asked if option.startswith(("--gres", "--time", "--partition"))]


def test_the_exit_code_is_that_of_the_training_and_set_up_must_work(job: Job) -> None:
    assert run(job_script(job, ClusterConfig()), CODE="75") == 75
    Path("ran").unlink()
    assert run(job_script(job, ClusterConfig(setup=("false",)))) == 1
    assert not Path("ran").exists()


def test_tasks_of_an_array_do_not_touch_each_other(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The array's first task has the array's id as its own: `scontrol requeue ID` would restart all tasks."""
    assert f"--output='{job.folder}/%A_%a.log'" in options(job_script(job, ClusterConfig(options=("--array=1-4%1",))))
    for name, value in {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    lines: list[str] = []
    requeue(15, log=lines.append)
    assert Path("scontrol.log").read_text() == "requeue 70_3\n"
    assert lines == ["requeued Slurm job 70_3"]


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False), ("", True)])
def test_a_cancelled_job_is_not_requeued(job: Job, commands: Path, monkeypatch: pytest.MonkeyPatch, state: str, requeued: bool) -> None:
    add_command(commands / "squeue", f'#!/bin/sh\n[ "$2" = --jobs=70 ] && echo {state}\n')
    monkeypatch.setenv("SLURM_JOB_ID", "70")
    lines: list[str] = []
    requeue(15, log=lines.append)
    assert Path("scontrol.log").exists() is requeued
    assert lines == ["requeued Slurm job 70" if requeued else "Slurm job 70 is COMPLETING, by scancel or after its time: not requeued"]


@pytest.mark.parametrize("array", [{}, {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}])
def test_a_container_without_scontrol_asks_the_script_to_requeue(
    job: Job, commands: Path, monkeypatch: pytest.MonkeyPatch, array: dict[str, str]
) -> None:
    cluster = ClusterConfig(container="tim.sif", mounts=("/data:/data", "/home:/home"))
    job.folder.mkdir(parents=True)
    add_command(commands / "apptainer", '#!/bin/sh\necho "$@" >> apptainer.log\n[ -z "$STOPPED" ] || touch "$TIM_REQUEUE_FILE"; exit 75\n')
    assert run(job_script(job, cluster), **array) == 75
    assert not Path("scontrol.log").exists(), "stopped by Ctrl-C, or failed"
    assert run(job_script(job, cluster), STOPPED="1", **array) == 75
    assert Path("scontrol.log").read_text() == ("requeue 70_3\n" if array else "requeue 41234\n")
    words = Path("apptainer.log").read_text()
    assert words.startswith("exec --nv --bind /data:/data --bind /home:/home tim.sif sh -c")
    assert " tim tim launch my file.yaml" in words

    monkeypatch.setenv("SLURM_JOB_ID", "41234")
    monkeypatch.setenv("TIM_REQUEUE_FILE", "asked")
    monkeypatch.setenv("PATH", "/nowhere")
    lines: list[str] = []
    requeue(15, log=lines.append)
    assert Path("asked").exists()
    assert lines == ["Slurm job 41234: the job script will requeue it"]


def test_a_request_that_cannot_be_written_is_a_warning(commands: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also from a container with a scontrol that does not reach the controller."""
    monkeypatch.setenv("SLURM_JOB_ID", "41234")
    monkeypatch.setenv("TIM_REQUEUE_FILE", str(tmp_path / "gone" / "asked"))
    lines: list[str] = []
    for path, why in (("/nowhere", r".*No such file or directory: 'scontrol'"), (str(commands), "no controller")):
        add_command(commands / "scontrol", "#!/bin/sh\necho no controller >&2\nexit 1\n")
        monkeypatch.setenv("PATH", path)
        requeue(15, log=lines.append)
        missing = rf"No such file or directory: {tmp_path}/gone/asked"
        assert re.fullmatch(rf"warning: scontrol requeue 41234 failed \({why}; {missing}\): submit the job again", lines.pop())
    (tmp_path / "gone").mkdir()
    requeue(15, log=lines.append)
    assert lines == ["Slurm job 41234: the job script will requeue it"]


def test_an_image_is_for_pyxis(job: Job) -> None:
    script = job_script(job, ClusterConfig(container="nvcr.io#lab/tim:1", mounts=("/data:/data",)))
    assert f"'--container-image=nvcr.io#lab/tim:1' --container-mounts=/data:/data --container-workdir={Path.cwd()}" in script


def test_the_script_is_submitted_from_the_run_folder(job: Job, commands: Path) -> None:
    add_command(commands / "sbatch", '#!/bin/sh\necho "$@" > sbatch.log\necho "17;cluster"\n')
    assert submit(job, "#!/bin/bash\n") == ("17", job.folder / "launch.sh")
    assert Path("sbatch.log").read_text() == f"--parsable {job.folder}/launch.sh\n"
    submit(job, "#!/bin/bash\n", is_private=True)
    assert (job.folder / "launch.sh").stat().st_mode & 0o777 == 0o600
    add_command(commands / "sbatch", "#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    with pytest.raises(ValueError, match=r"--slurm: sbatch refused .*launch.sh: sbatch: error: invalid partition"):
        submit(job, "#!/bin/bash\n")


def test_without_sbatch_the_remedy_is_named(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="no sbatch on this machine; run it on a login node"):
        submit(job, "#!/bin/bash\n")
