"""Which path a segment takes: a frozen value that a pure function reads.

The values here are predictions from the field's figures, not measurements of this machine; a
measured `PathTable` replaces them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from triton_offload.specs import Direction


class Path(Enum):
    """How a segment crosses between pages and the host pool."""

    STAGED = "staged"  # a kernel gathers into a staging buffer, the copy engine moves that
    ZERO_COPY = "zero_copy"  # a kernel reads or writes mapped host memory
    COPY_ENGINE = "copy_engine"  # the copy engine alone, a piece for every run of pages


@dataclass(frozen=True, slots=True)
class PathRule:
    """From `min_page_bytes` and `min_pages` on, `direction` takes `path`."""

    direction: Direction
    min_page_bytes: int
    min_pages: int
    path: Path


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
