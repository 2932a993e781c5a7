"""What this machine has for training, and what is missing: the checks of `tim doctor`."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from launch.text_tables import count
from tim.attention.dispatch import AttentionRequirements, choose_backend, obstacles

SHARED_MEMORY = Path("/dev/shm")
ENOUGH_SHARED, ENOUGH_DISK, ENOUGH_FILES = 2e9, 50e9, 4096
ABSENT = "not installed"
UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)
OPTIONAL = {
    "bitsandbytes": "train.optimizer=adamw8bit: pip install 'tim[adamw8bit]'",
    "diffusers": "codecs other than pixel: pip install 'tim[latent]'",
    "transformers": "text encoders of kind hf: pip install 'tim[latent]'",
    "flash_attn_interface": "flash-attn 3 on Hopper GPUs: see the flash-attention repository",
    "flash_attn": "flash-attn 2: pip install 'tim[flash]'",
    "py_spy": "stacks of hanging ranks: pip install 'tim[stacks]'",
    "peft": "train.lora: pip install peft",
    "wandb": "the tracker wandb: pip install wandb",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `tim doctor`. remedy: what to do about a warning, "" if there is nothing to do."""

    name: str
    status: Literal["ok", "warning"]
    detail: str
    remedy: str = ""


def examine(run_dir: Path) -> list[Finding]:
    """Look at this machine. run_dir: where runs are to be written."""
    parts = (_versions(), _devices(), _interconnect(), _attention(), _compilers(), _limits(), _disk(run_dir), _clock(), _packages())
    return [finding for part in parts for finding in part]


def versions() -> dict[str, str]:
    """Versions that must be the same on all nodes."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": _version("deepspeed"), "tim": _version("tim")}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        found["nccl"] = _nccl_version() if torch.cuda.is_available() else "unknown"
    return found


def _nccl_version() -> str:
    from torch.cuda import nccl

    return ".".join(map(str, nccl.version()))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT


def _versions() -> Iterator[Finding]:
    detail = ", ".join(f"{name} {version}" for name, version in versions().items())
    wrong = [f"{each.name} {found}, needed {each.specifier}" for each, found in _unmet()]
    remedy = "pip install --upgrade tim -c constraints.txt" if wrong else ""
    yield Finding("versions", "warning" if wrong else "ok", "; ".join([detail, *wrong]), remedy)


def _unmet() -> Iterator[tuple[Requirement, str]]:
    """Requirements of this package that are not met, and the version that is installed."""
    try:
        texts = metadata.requires("tim") or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, texts):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found == ABSENT or not requirement.specifier.contains(found, prereleases=True):
            yield requirement, found


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        cores = f"{count(os.cpu_count() or 1, 'core')}, {count(torch.get_num_threads(), 'thread')}"
        why = "torch was built without CUDA" if torch.version.cuda is None else "no CUDA device is visible to torch"
        remedy = "install torch for CUDA, check nvidia-smi and CUDA_VISIBLE_DEVICES; on a CPU only small networks can be trained"
        yield Finding("devices", "warning", f"CPU, {cores}: {why}", remedy)
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        used = 1 - free / total
        detail = f"{facts.name}, {total / 1e9:.0f} GB, {used:.0%} in use, compute capability {facts.major}.{facts.minor}"
        busy = used > 0.1
        yield Finding(f"device {index}", "warning" if busy else "ok", detail, "end the other processes on it: nvidia-smi" if busy else "")


def _interconnect() -> Iterator[Finding]:
    """Links between the GPUs of this machine, and to other machines."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    pairs = [(a, b) for a in range(gpus) for b in range(a + 1, gpus)]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        remedy = "collectives go through host memory; in virtual machines enable peer-to-peer access, and see nvidia-smi topo -m"
        yield Finding("peer access", "warning", f"{len(apart)} of {len(pairs)} pairs of GPUs have none", remedy)
    elif pairs:
        yield Finding("peer access", "ok", f"between all {gpus} GPUs")
    states = [path.read_text().strip() for path in Path("/sys/class/infiniband").glob("*/ports/*/state")]
    active = sum("ACTIVE" in state for state in states)
    fabric = [f"{active} of {len(states)} InfiniBand or RoCE ports are active"] if states else []
    speeds = [f"{name} {speed / 1000:g} Gbit/s" for name, speed in _network_speeds()]
    detail = ", ".join([*fabric, *speeds]) or "no network card that tells its speed"
    down = bool(states) and active < len(states)
    yield Finding("network", "warning" if down else "ok", detail, "see ibstat; NCCL uses active ports only" if down else "")


def _network_speeds() -> Iterator[tuple[str, int]]:
    """Network cards that are up, with Mbit/s."""
    for card in sorted(Path("/sys/class/net").glob("*")):
        try:
            speed = int((card / "speed").read_text())
        except (OSError, ValueError):
            continue
        if speed > 0:
            yield card.name, speed


def _attention() -> Iterator[Finding]:
    """The backend that a training uses for each precision, and why not the others."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    for dtype in (torch.bfloat16, torch.float32):
        needs = AttentionRequirements(device, dtype, backward=True, capability=capability)
        chosen = choose_backend(needs)
        others = [f"{name} {why}" if why else f"{name} is possible" for name, why in obstacles(needs).items() if name != chosen]
        slow = device == "cuda" and dtype == torch.bfloat16 and chosen == "sdpa"
        remedy = "use a GPU of compute capability 8.0 or more, or install flash-attn" if slow else ""
        yield Finding(f"attention {str(dtype)[6:]}", "warning" if slow else "ok", f"{chosen} on {device}; {'; '.join(others)}", remedy)


def _compilers() -> Iterator[Finding]:
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    detail = f"{compiler or 'no C++ compiler'}, {'ninja' if shutil.which('ninja') else 'no ninja'}"
    if torch.cuda.is_available():
        detail += f", {'triton' if find_spec('triton') else 'no triton'}, {'nvcc' if shutil.which('nvcc') else 'no nvcc'}"
    missing = compiler is None or (torch.cuda.is_available() and find_spec("triton") is None)
    remedy = "train.compile, FlexAttention and DeepSpeed's CPU Adam need them: apt-get install g++ ninja-build, pip install triton"
    yield Finding("compiler", "warning" if missing else "ok", detail, remedy if missing else "")


def _limits() -> Iterator[Finding]:
    """Shared memory and limits of the process."""
    if SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(SHARED_MEMORY)
        small = size.free < ENOUGH_SHARED
        remedy = "loader workers pass images through it: docker run --shm-size=16g, or loader.workers=0" if small else ""
        yield Finding("/dev/shm", "warning" if small else "ok", f"{size.free / 1e9:.1f} of {size.total / 1e9:.1f} GB free", remedy)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = files != resource.RLIM_INFINITY and files < ENOUGH_FILES
    remedy = f"ulimit -n {ENOUGH_FILES * 16}, or LimitNOFILE in the service" if few else ""
    yield Finding("open files", "warning" if few else "ok", f"limit {_limit(files)}", remedy)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    needs_locked = locked != resource.RLIM_INFINITY and Path("/sys/class/infiniband").is_dir()
    remedy = "RDMA registers memory: ulimit -l unlimited, docker run --ulimit memlock=-1" if needs_locked else ""
    yield Finding("locked memory", "warning" if needs_locked else "ok", f"limit {_limit(locked)}", remedy)


def _limit(value: int) -> str:
    return "none" if value == resource.RLIM_INFINITY else f"{value:,}"


def _disk(run_dir: Path) -> Iterator[Finding]:
    folder = next(each for each in (run_dir, *run_dir.absolute().parents) if each.is_dir())
    size, writable = shutil.disk_usage(folder), os.access(folder, os.W_OK)
    detail = f"{folder.absolute()}: {size.free / 1e9:,.0f} of {size.total / 1e9:,.0f} GB free{'' if writable else ', not writable'}"
    remedy = "" if writable and size.free >= ENOUGH_DISK else "give another run_dir; a checkpoint takes 16 bytes per trained parameter"
    yield Finding("disk", "warning" if remedy else "ok", detail, remedy)


def _clock() -> Iterator[Finding]:
    """Whether the kernel knows the clock to be synchronised."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "adjtimex"):
        return
    state = libc.adjtimex(ctypes.create_string_buffer(512))  # larger than struct timex; zeros only read
    bad = state == UNSYNCHRONISED
    detail = {-1: "state unknown", UNSYNCHRONISED: "not synchronised"}.get(state, "synchronised")
    yield Finding(
        "clock", "warning" if bad else "ok", detail, "start chronyd or systemd-timesyncd: logs of nodes are compared" if bad else ""
    )


def _packages() -> Iterator[Finding]:
    there = [name for name in OPTIONAL if find_spec(name)]
    missing = [f"{name} ({use})" for name, use in OPTIONAL.items() if name not in there]
    yield Finding("optional packages", "ok", f"installed: {', '.join(there) or 'none'}; not: {'; '.join(missing) or 'none'}")
