"""`tim launch --k8s`: what Kubernetes requires of the manifest. No cluster takes part."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.clusters.kubernetes import manifest
from launch.config.run_sections import ClusterConfig

CLUSTER = ClusterConfig(
    container="registry/tim:1", mounts=("data:/data", "data:/again", "/scratch:/scratch"), env={"NCCL_DEBUG": "on"}, cpus=48
)
DNS_NAME = re.compile(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?")


def documents(cluster: ClusterConfig = CLUSTER, *, config: str = "photos", run_dir: str = "runs/My_Run.2") -> dict[str, Any]:
    """The manifest by kind, read as Kubernetes reads it: YAML 1.1."""
    text = manifest(Path(run_dir), cluster, config=config, arguments=["seed=1", "text.path=$(HOME)"], nnodes=4, nproc=8, workers=2)
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_a_service_names_the_pods_of_an_indexed_job() -> None:
    found = documents()
    assert set(found) == {"Service", "Job"}
    service, job = found["Service"], found["Job"]
    name = job["metadata"]["name"]
    assert DNS_NAME.fullmatch(name)
    assert (service["apiVersion"], job["apiVersion"]) == ("v1", "batch/v1")
    assert service["metadata"]["name"] == name == job["spec"]["template"]["spec"]["subdomain"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": name}, "the label that Kubernetes gives to the pods of a Job"
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy requires it"
    rules = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in spec["podFailurePolicy"]["rules"]]
    assert rules == [("FailJob", [2]), ("Ignore", [75]), ("Ignore", None)]


def test_every_pod_runs_tim_launch_at_its_place() -> None:
    job = documents()["Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    name, command = job["metadata"]["name"], container["command"]
    assert command[:5] == ["tim", "launch", "photos", "seed=1", "text.path=$$(HOME)"]
    assert command[5:] == (
        ["--nproc-per-node", "8", "--nnodes", "4", "--node-rank", "$(NODE_RANK)", "--rdzv-endpoint", f"{name}-0.{name}:29500"]
    )
    rank, debug = container["env"]
    assert rank["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert debug == {"name": "NCCL_DEBUG", "value": "on"}, "a text, though YAML 1.1 reads `on` as true"
    assert container["resources"] == {"requests": {"cpu": 48, "nvidia.com/gpu": 8}, "limits": {"nvidia.com/gpu": 8}}
    assert container["workingDir"] == "/data"


def test_setup_lines_run_before_and_nothing_is_expanded(tmp_path: Path) -> None:
    """Kubernetes replaces $(NAME) by a variable, and $$( by $(."""
    cluster = CLUSTER.model_copy(update={"setup": ("export A=$(echo up)  # set up", "echo $A"), "env": {"B": "$(HOME)"}})
    (container,) = documents(cluster)["Job"]["spec"]["template"]["spec"]["containers"]
    assert container["env"][1] == {"name": "B", "value": "$$(HOME)"}
    command = [word.replace("$$(", "$(") for word in container["command"]]
    (tmp_path / "tim").write_text('#!/bin/sh\necho "$A $1 $2"\n')
    (tmp_path / "tim").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "up\nup launch photos\n"


def test_volumes_are_those_that_containers_mount() -> None:
    pod = documents()["Job"]["spec"]["template"]["spec"]
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {
        "/dev/shm": {"emptyDir": {"medium": "Memory"}},
        "/data": {"persistentVolumeClaim": {"claimName": "data"}},
        "/again": {"persistentVolumeClaim": {"claimName": "data"}},
        "/scratch": {"hostPath": {"path": "/scratch"}},
    }


def test_a_config_file_travels_with_the_job(tmp_path: Path) -> None:
    text = 'seed: 1\nrun_dir: "x: y"\n'
    (tmp_path / "mine.yaml").write_text(text)
    found = documents(config=str(tmp_path / "mine.yaml"))
    assert found["ConfigMap"]["data"] == {"config.yaml": text}
    pod = found["Job"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][2] == "/etc/tim/config.yaml"
    assert {"name": "config", "configMap": {"name": found["ConfigMap"]["metadata"]["name"]}} in pod["volumes"]


def test_a_cluster_without_gpus() -> None:
    job = documents(ClusterConfig(container="tim", mounts=("data:/data",), gres=None))["Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {"requests": {"cpu": 32}}


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (ClusterConfig(mounts=("data:/data",)), "give cluster.container=IMAGE"),
        (ClusterConfig(container="tim"), "give cluster.mounts="),
    ],
)
def test_what_is_missing_is_named(cluster: ClusterConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        documents(cluster)


@pytest.mark.parametrize("run_dir", ["runs/" + "x" * 80, "runs/ünter--", "/", "runs/1"])
def test_names_are_names_of_hosts(run_dir: str) -> None:
    name = documents(run_dir=run_dir)["Job"]["metadata"]["name"]
    assert DNS_NAME.fullmatch(name)
    assert len(f"{name}-999") <= 63
