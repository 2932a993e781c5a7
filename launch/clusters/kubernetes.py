"""Kubernetes: the manifest of a training, for `kubectl apply -f -`. No operator is needed.

An indexed Job has one pod for each machine, and a headless Service gives pods names by which they find each other. A pod that is evicted or
moved saves and exits with code 75; all pods do, and are started again without counting as failures. The config travels in a ConfigMap.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.clusters.hosts import PORT, setup_lines
from launch.config.run_sections import ClusterConfig
from launch.console import STOPPED

_CONFIG_FOLDER = "/etc/tim"
_WRONG_CONFIG = 2  # exit code
_FAILURES = 10  # of single pods, before the Job counts as failed
_GRACE_SECONDS = 600  # for a save on eviction
_RANK = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def manifest(run_dir: Path, cluster: ClusterConfig, *, config: str, arguments: Sequence[str], nnodes: int, nproc: int, workers: int) -> str:
    """YAML of a Service, a Job and, unless `config` is a recipe, a ConfigMap.

    Args:
        config: a recipe's name, or the path of a YAML file on this machine.
        arguments: overrides and options of `tim launch`.

    Raises:
        ValueError: the image or a shared volume is missing.
    """
    if cluster.container is None:
        raise ValueError("--k8s needs the image of the pods: give cluster.container=IMAGE, which must have `tim` and its dependencies")
    if not cluster.mounts:
        raise ValueError("--k8s needs a volume that all pods share, for corpus and run_dir: give cluster.mounts=[CLAIM:/PATH]")
    name = _dns_name(run_dir.absolute().name)
    path = Path(config)
    documents = [_service(name)]
    if path.is_file():
        data = {"config.yaml": path.read_text(encoding="utf-8")}
        documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})
        config = f"{_CONFIG_FOLDER}/config.yaml"
    place = ["--nproc-per-node", str(nproc), "--nnodes", str(nnodes), "--node-rank", "$(NODE_RANK)"]
    command = ["tim", "launch", _unexpanded(config), *map(_unexpanded, arguments), *place, "--rdzv-endpoint", f"{name}-0.{name}:{PORT}"]
    if cluster.setup:
        command = ["sh", "-ec", _unexpanded("\n".join([*setup_lines(cluster.setup), 'exec "$@"'])), "tim", *command]
    requests: dict[str, Any] = {"cpu": cluster.cpus or nproc * (workers + 2)}
    limits = {} if cluster.gres is None else {"nvidia.com/gpu": nproc}
    container = {
        "name": "tim",
        "image": cluster.container,
        "command": command,
        "workingDir": cluster.mounts[0].partition(":")[2],
        "env": [
            {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _RANK}}},
            *({"name": key, "value": _unexpanded(value)} for key, value in cluster.env.items()),
        ],
        "resources": {"requests": {**requests, **limits}, **({"limits": limits} if limits else {})},
    }
    documents.append(_job(name, container, mounts=cluster.mounts, nnodes=nnodes, has_config=path.is_file()))
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=140)


def _service(name: str) -> dict[str, Any]:
    """Headless: it only names the pods, from their start."""
    ports = [{"name": "rendezvous", "port": PORT}]
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": name}, "ports": ports}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def _job(name: str, container: dict[str, Any], *, mounts: Sequence[str], nnodes: int, has_config: bool) -> dict[str, Any]:
    sources = list(dict.fromkeys(mount.partition(":")[0] for mount in mounts))
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]  # loaders and NCCL need more than 64 MB
    container["volumeMounts"] = [{"name": "shm", "mountPath": "/dev/shm"}]
    for number, source in enumerate(sources):
        kind = {"hostPath": {"path": source}} if source.startswith("/") else {"persistentVolumeClaim": {"claimName": source}}
        volumes.append({"name": f"data-{number}", **kind})
    for mount in mounts:
        source, _, target = mount.partition(":")
        container["volumeMounts"].append({"name": f"data-{sources.index(source)}", "mountPath": target})
    if has_config:
        volumes.append({"name": "config", "configMap": {"name": name}})
        container["volumeMounts"].append({"name": "config", "mountPath": _CONFIG_FOLDER})
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "containers": [container],
        "volumes": volumes,
    }
    rules = [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [_WRONG_CONFIG]}},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [STOPPED]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
    ]
    spec = {
        "completionMode": "Indexed",
        "completions": nnodes,
        "parallelism": nnodes,
        "backoffLimit": _FAILURES * nnodes,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": pod},
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def _unexpanded(text: str) -> str:
    """A text in which Kubernetes does not replace $(NAME)."""
    return text.replace("$(", "$$(")


def _dns_name(text: str) -> str:
    """A name that Kubernetes takes for a Service: letters, digits and dashes, a letter first. Pods get a number behind it."""
    return f"tim-{re.sub('[^a-z0-9]+', '-', text.lower())}"[:50].strip("-")


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)
