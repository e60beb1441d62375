"""What a user may choose of the worker side."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from triton_offload.calibration import Path, PathName, PathTable
from triton_offload.kernels.arguments import shown

#: whether bytes are added up: not at all, and kept with what was stored, and compared by loads too
Verify: TypeAlias = Literal["off", "store", "load"]


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """Sizes of the worker side.

    `path`: every segment crosses by it, a `Path` or its name; None: `paths` chooses.
    `buffer_bytes` and `num_buffers`: of each lane's staging ring; a buffer holds at least one
    chunk. `max_indices`: ids in flight per lane, and with `verify` sums, each 8 bytes of device
    memory. `window_bytes`: bytes queued ahead per lane, for cards whose copy engine serves first
    in, first out; it costs throughput, None: no bound.
    `verify`: "store": pages are added up when they are stored, and the sums kept; "load": and
    when they are loaded, where a load that brings other bytes has failed (`ChecksumError`).

    Raises ValueError or TypeError naming the field, what was expected and what was given.
    """

    path: Path | PathName | None = None
    paths: PathTable | None = None
    buffer_bytes: int = 16 << 20
    num_buffers: int = 3
    max_indices: int = 1 << 20
    window_bytes: int | None = None
    verify: Verify = "off"

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", _path(self.path))
        if self.paths is not None and not isinstance(self.paths, PathTable):
            raise TypeError(f"paths: expected a PathTable or None, got {shown(self.paths)}")
        check_verify(self.verify)
        if self.verify != "off" and self.path is Path.COPY_ENGINE:
            raise ValueError(
                f"path: expected one whose kernels see the bytes, beside verify={self.verify!r}, "
                "got 'copy_engine'"
            )
        for name in ("buffer_bytes", "num_buffers", "max_indices", "window_bytes"):
            value = getattr(self, name)
            if name != "window_bytes" or value is not None:
                object.__setattr__(self, name, _size(name, value))


def check_verify(verify: object) -> None:
    """Raises ValueError for what is none."""
    if verify not in get_args(Verify):
        raise ValueError(f"verify: expected one of {list(get_args(Verify))}, got {shown(verify)}")


def _path(value: object) -> Path:
    if not isinstance(value, (Path, str)):
        raise TypeError(f"path: expected a Path, its name or None, got {shown(value)}")
    try:
        return Path(value)
    except ValueError:
        names = [path.value for path in Path]
        raise ValueError(f"path: expected one of {names} or None, got {value!r}") from None


def _size(name: str, value: object) -> int:
    expected = "an integer or None" if name == "window_bytes" else "an integer"
    try:
        if isinstance(value, bool):
            raise TypeError
        size = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {shown(value)}") from None
    if size < 1:
        raise ValueError(f"{name}: expected at least 1, got {size}")
    return size
