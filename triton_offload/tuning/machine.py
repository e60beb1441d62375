"""What the system says about the machine. Readers take the roots, so that tests can make up one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from triton_offload.tuning.calibration_file import Machine
from triton_offload.version import __version__

_GEN_OF_SPEED = {"2.5": 1, "5": 2, "8": 3, "16": 4, "32": 5, "64": 6}  # by GT/s
_LANE_GB_PER_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.97, 5: 3.94, 6: 7.56}
_UNLIMITED = 1 << 60  # cgroup v1 has a number near 2**63 for no limit


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the system shows itself."""

    sys: Path = Path("/sys")
    proc: Path = Path("/proc")
    shm: Path = Path("/dev/shm")


ROOTS = Roots()


@dataclass(frozen=True, slots=True)
class LinkWidth:
    """A PCIe generation and a number of lanes."""

    gen: int
    lanes: int

    def __str__(self) -> str:
        return f"Gen{self.gen} x{self.lanes}"

    @property
    def gb_per_s(self) -> float:
        """What the line code leaves of it each way, in 10**9 bytes per second; packet headers take
        another tenth."""
        return _LANE_GB_PER_S[self.gen] * self.lanes


@dataclass(frozen=True, slots=True)
class Link:
    """How a card is connected now (an idle one saves power in a low generation), and the most that
    the card, and the slot where it is known, can do."""

    now: LinkWidth
    card: LinkWidth
    slot: LinkWidth | None = None

    @property
    def best(self) -> LinkWidth:
        """What card and slot can do together."""
        slot = self.slot
        # The slot of a virtual machine is made up: one that can do less than what runs is not it.
        if slot is None or slot.gen < self.now.gen or slot.lanes < self.now.lanes:
            return self.card
        return LinkWidth(min(self.card.gen, slot.gen), min(self.card.lanes, slot.lanes))

    @property
    def identity(self) -> str:
        """The same whether the card is idle or not."""
        gens = [end.gen for end in (self.card, self.slot) if end is not None]
        return str(LinkWidth(min(gens), self.now.lanes))


def read_link(sys: Path, bus_id: str) -> Link | None:
    """The link of the device with this PCI address ("0000:17:00.0"); None where sysfs has none."""
    card = (sys / "bus/pci/devices" / bus_id).resolve()
    now = _read_width(card, "current")
    if now is None:
        return None
    return Link(now, _read_width(card, "max") or now, _read_width(card.parent, "max"))


def parse_link(text: str) -> Link | None:
    """The link as nvidia-smi tells it, where sysfs does not show it: generation and lanes now, then
    the most that card and system can do together ("3, 8, 5, 16")."""
    numbers = re.fullmatch(r"([1-6]), (\d+), ([1-6]), (\d+)", text.strip())
    if numbers is None:
        return None
    gen, lanes, most_gen, most_lanes = map(int, numbers.groups())
    return Link(LinkWidth(gen, lanes), LinkWidth(most_gen, most_lanes))


def read_cards(sys: Path) -> list[str]:
    """The PCI addresses of NVIDIA's display and 3D controllers, whether a driver has them or not.
    (AMD's are in every second desktop CPU.)"""
    found = (sys / "bus/pci/devices").glob("*")
    return sorted(
        device.name
        for device in found
        if _read(device / "vendor") == "0x10de" and _read(device / "class").startswith("0x03")
    )


def read_huge_pages(sys: Path) -> str:
    """When shared anonymous memory, which a pool is, gets huge pages ("never", "advise", ...);
    empty where the system does not say."""
    match = re.search(r"\[(\w+)\]", _read(sys / "kernel/mm/transparent_hugepage/shmem_enabled"))
    return match[1] if match else ""


def read_memory_limit(sys: Path, proc: Path) -> int | None:
    """Bytes that the process's control group may use in all; None for no limit."""
    limits = []
    for line in _read(proc / "self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, name = sys / "fs/cgroup", "memory.max"
        if controllers:
            root, name = root / "memory", "memory.limit_in_bytes"
        # In a container the named group may lie outside of what is mounted; its root does not.
        parts = Path(group.lstrip("/")).parts
        for depth in range(len(parts) + 1):
            text = _read(root.joinpath(*parts[:depth]) / name)
            if text.isdigit() and int(text) < _UNLIMITED:
                limits.append(int(text))
    return min(limits, default=None)


def read_memory_available(proc: Path) -> int | None:
    """Bytes that can be allocated without swapping."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(proc / "meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def read_locked_limit(proc: Path) -> int | None:
    """Bytes that the process may lock in memory (`ulimit -l`); None for no limit."""
    match = re.search(r"^Max locked memory\s+(\d+)\s", _read(proc / "self/limits"), re.MULTILINE)
    return int(match[1]) if match else None


def read_nodes_of(proc: Path, address: int) -> dict[int, int]:
    """How many pages of the mapping that starts at `address` lie on each NUMA node."""
    for line in _read(proc / "self/numa_maps").splitlines():
        start, *words = line.split()
        if int(start, 16) == address:
            found = [re.fullmatch(r"N(\d+)=(\d+)", word) for word in words]
            return {int(match[1]): int(match[2]) for match in found if match}
    return {}


def read_driver(proc: Path) -> str | None:
    """The version of NVIDIA's kernel driver."""
    match = re.search(r"Module.*?\s(\d+\.\d+(\.\d+)?)\s", _read(proc / "driver/nvidia/version"))
    return match[1] if match else None


def read_cpu(proc: Path) -> str:
    """The name of the CPU, as it gives it."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(proc / "cpuinfo"), re.MULTILINE)
    return match[1].strip() if match else "cpu"


def bus_id(device: torch.device) -> str:
    """The PCI address of a CUDA device, as sysfs names it."""
    it: Any = torch.cuda.get_device_properties(device)
    return f"{it.pci_domain_id:04x}:{it.pci_bus_id:02x}:{it.pci_device_id:02x}.0"


def identify(device: torch.device, roots: Roots = ROOTS) -> Machine:
    """What a calibration of this device is kept under. Costs no more than a few small files."""
    if device.type == "cpu":
        card = f"{read_cpu(roots.proc)}, {torch.get_num_threads()} threads"
        return Machine(card, f"torch {torch.__version__}", "memory", __version__)
    link = read_link(roots.sys, bus_id(device))
    card = torch.cuda.get_device_name(device)
    driver = read_driver(roots.proc) or f"cuda {torch.version.cuda}, hip {torch.version.hip}"
    return Machine(card, driver, link.identity if link else "unknown", __version__)


def _read_width(device: Path, which: str) -> LinkWidth | None:
    speed = re.match(r"(\d+(\.\d+)?) GT/s", _read(device / f"{which}_link_speed"))
    lanes = _read(device / f"{which}_link_width")
    if speed is None or not lanes.isdigit() or int(lanes) == 0:
        return None
    gen = _GEN_OF_SPEED.get(f"{float(speed[1]):g}")
    return None if gen is None else LinkWidth(gen, int(lanes))


def _read(file: Path) -> str:
    """The stripped text of a file, empty where there is none that can be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
