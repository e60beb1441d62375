"""Memory of a NUMA node: which node a card is on, and a mapping's pages put there."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

_SYS = Path("/sys")
_MBIND = {"x86_64": 237, "aarch64": 235}  # the number of the system call; libc has no function
_PREFERRED = 1  # MPOL_PREFERRED: elsewhere where the node is full


def node_of_card(bus_id: str, sys: Path = _SYS) -> int | None:
    """The node of the PCI device of this address ("0000:17:00.0"); None where the system does not
    say."""
    text = _read(sys / "bus/pci/devices" / bus_id / "numa_node")
    return int(text) if text.isdigit() else None


def has_several_nodes(sys: Path = _SYS) -> bool:
    """Whether memory is on more than one."""
    nodes = _read(sys / "devices/system/node/has_memory")  # "0", "0-1", "0,8"
    return "-" in nodes or "," in nodes


def prefer(address: int, num_bytes: int, node: int) -> str | None:
    """Have pages that are touched from now on lie on the node, where it has room. `address`: of
    the first byte of a page. Why it can't be had, else None."""
    number = _MBIND.get(platform.machine())
    if number is None:
        return f"no call for it is known on {platform.machine()}"
    mask = (ctypes.c_ulong * (node // 64 + 1))()
    mask[node // 64] = 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel takes one bit less than it is told.
    failed = libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(num_bytes),
        ctypes.c_int(_PREFERRED),
        mask,
        ctypes.c_ulong(64 * len(mask) + 1),
        ctypes.c_uint(0),
    )
    return f"mbind: {os.strerror(ctypes.get_errno())}" if failed else None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
