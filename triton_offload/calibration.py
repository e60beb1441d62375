"""What depends on the machine: frozen values that pure functions read.

The values here are predictions from the field's figures, not measurements of this machine; a
measured `Calibration` replaces them (`calibrate.py` measures, `fitting.py` fits, and
`calibration_file.py` keeps it).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeAlias

from triton_offload.specs import Direction


class Path(Enum):
    """How a segment crosses between pages and the host pool."""

    STAGED = "staged"  # a kernel gathers into a staging buffer, the copy engine moves that
    ZERO_COPY = "zero_copy"  # a kernel reads or writes mapped host memory
    COPY_ENGINE = "copy_engine"  # the copy engine alone, a range for pages that lie together

    __hash__ = object.__hash__  # as of `Direction`


#: what a user may ask for; "auto": the table decides
PathName: TypeAlias = Literal["staged", "zero_copy", "copy_engine"]
PathChoice: TypeAlias = PathName | Literal["auto"]


def _check(name: str, value: int, least: int, most: int = 1 << 62) -> None:
    if type(value) is not int or not least <= value <= most:  # what a file holds may be anything
        raise ValueError(f"{name}: expected an integer from {least} to {most}, got {value!r}")


@dataclass(frozen=True, slots=True)
class PathRule:
    """From `min_page_bytes` and `min_pages` on, `direction` takes `path`."""

    direction: Direction
    min_page_bytes: int
    min_pages: int
    path: Path

    def __post_init__(self) -> None:
        _check("min_page_bytes", self.min_page_bytes, 0)
        _check("min_pages", self.min_pages, 0)


@dataclass(frozen=True, slots=True)
class PathTable:
    """Rules in order; the last that applies wins, and `default` where none does."""

    default: Path
    rules: tuple[PathRule, ...] = ()

    def choose(self, direction: Direction, page_bytes: int, pages: int) -> Path:
        """`page_bytes`: the mean page of the group. `pages`: pages of the job in that group."""
        path = self.default
        for rule in self.rules:
            if (
                rule.direction is direction
                and page_bytes >= rule.min_page_bytes
                and pages >= rule.min_pages
            ):
                path = rule.path
        return path


# CPU memory: pages go straight to their slots; a staging buffer would copy every byte twice.
HOST_PATHS = PathTable(Path.ZERO_COPY)

# vLLM's measurement on an H100 (PCIe Gen5) has the copy engine at 40-44 GB/s from 28 KiB and at
# 51 from 64 KiB, so that gathering first stops paying somewhere above. To be measured.
CUDA_PATHS = PathTable(
    Path.STAGED,
    tuple(PathRule(direction, 512 << 10, 0, Path.COPY_ENGINE) for direction in Direction),
)


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """How a kernel's launch is cut up: at most `programs` CTAs, each of `warps` * 32 threads."""

    programs: int
    warps: int

    def __post_init__(self) -> None:
        _check("programs", self.programs, 1)
        _check("warps", self.warps, 1, 32)
        if self.warps & (self.warps - 1):
            raise ValueError(f"warps: expected a power of two, got {self.warps}")


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a measurement of the machine decides.

    `buffer_bytes`: a staging buffer, and so the largest segment. `staged`, `zero_copy`: the
    launches of kernels that work on staging buffers, and on mapped host memory; None: as the
    kernels have it, and on the host device, which launches none.
    """

    paths: PathTable
    buffer_bytes: int = 16 << 20
    staged: LaunchShape | None = None
    zero_copy: LaunchShape | None = None

    def __post_init__(self) -> None:
        _check("buffer_bytes", self.buffer_bytes, 1, 1 << 30)


def default_calibration(device_type: str) -> Calibration:
    """What holds where nothing was measured. `device_type`: torch's, "cpu" or "cuda"."""
    return Calibration(HOST_PATHS if device_type == "cpu" else CUDA_PATHS)
