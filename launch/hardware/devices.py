"""Table of GPUs: memory, speed and price, from configs/hardware/devices.yaml and a file of the user's."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

import configs
from launch.config import yaml_file
from launch.config.section import Section
from launch.config.yaml_file import ConfigError

TABLE = Path(configs.__path__[0]) / "hardware" / "devices.yaml"


class Device(Section):
    """A GPU. Speeds are of matrix products, by the data sheet."""

    title: str
    memory: float = Field(gt=0)
    """Bytes."""
    bf16: float = Field(gt=0)
    """FLOP/s in bfloat16."""
    fp32: float = Field(gt=0)
    """FLOP/s in float32."""
    efficiency: float = Field(default=0.4, gt=0, le=1)
    """Share of that speed which training reaches."""
    price: float = Field(default=0.0, ge=0)
    """US dollars per hour."""

    @property
    def usable(self) -> float:
        """Bytes that tensors may take: without the CUDA context, the buffers of NCCL and what the allocator cannot use."""
        return 0.95 * self.memory - 0.8e9


def find_device(name: str, *, table: Path | None = None) -> Device:
    """A device by name, from the user's table or the shipped one. Raises ConfigError naming the nearest."""
    known = read_devices(TABLE) | (read_devices(table) if table else {})
    found = known.get(name.lower())
    if found is None:
        raise ConfigError(f"--device {name}: not in {table or TABLE.name}; {yaml_file.nearest_of(name.lower(), sorted(known))}")
    return found


def read_devices(path: Path) -> dict[str, Device]:
    """The devices of a table. Raises ConfigError."""
    raw = yaml_file.read(path)
    devices = {}
    for name, entry in raw.values.items():
        values = entry if isinstance(entry, dict) else {}
        part = yaml_file.RawConfig(name=f"{raw.location((name,))}: {name}", values=values)
        devices[name.lower()] = yaml_file.check(part, Device)
    return devices
