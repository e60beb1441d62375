"""Sizes in bytes as people write them."""

from __future__ import annotations

import contextlib
import operator
import re
from decimal import Decimal

from triton_offload.kernels.arguments import shown

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
_UNITS |= {p: 1024**i for i, p in enumerate("KMGT", 1)}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(name: str, size: int | str) -> int:
    """`size` in bytes: an int, of numpy too, or a number with a unit ("8GiB", "500 MB", "16K" =
    16 KiB), a fraction of a byte dropped.

    Raises ValueError that names the argument `name`.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        units = {unit.lower(): factor for unit, factor in _UNITS.items()}
        if match is not None and match[2].lower() in units:
            return int(Decimal(match[1]) * units[match[2].lower()])  # a float is off by one byte
    elif not isinstance(size, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(size)
            if number >= 0:
                return number
    raise ValueError(f'{name}: expected a number of bytes, or one like "8GiB", got {shown(size)}')


def format_bytes(num_bytes: float) -> str:
    """The size in the largest binary unit of which it is at least one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
