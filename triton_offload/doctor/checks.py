"""What stands in the way of transfers on this machine: one small check for each way to lose."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from triton_offload.calibration import Path
from triton_offload.doctor.facts import Facts
from triton_offload.sizes import format_bytes
from triton_offload.specs import Direction

TORCH, TRITON = "2.11", "3.6"  # and later, as pyproject.toml says
VLLM = ("0.32", "0.33")  # as vllm/versions.py says

# Of what the line code of a link leaves, packet headers take some 12 %; a plain copy that gets
# less than this is held up by something else.
_LEAST_OF_LINK = 0.6


class Status(Enum):
    """What a finding means for whoever runs the machine."""

    OK = "ok"
    NOTE = "note"  # could be better, or is worth knowing
    PROBLEM = "problem"  # costs speed or keeps something from working, and can be mended


@dataclass(frozen=True, slots=True)
class Finding:
    """`what` was found, and in one line what to do about it."""

    name: str
    status: Status
    what: str
    advice: str = ""


def examine(facts: Facts) -> list[Finding]:
    """Every check that applies to the machine, in the order of a transfer's way through it."""
    return [finding for check in _CHECKS for finding in check(facts)]


def sound(findings: list[Finding]) -> bool:
    """Whether nothing is wrong."""
    return all(finding.status is not Status.PROBLEM for finding in findings)


def check_device(facts: Facts) -> Iterator[Finding]:
    if facts.has_gpu:
        what = f"{facts.identity.card}, driver {facts.identity.driver}"
        yield Finding("device", Status.OK, what)
    elif facts.unused_cards:
        yield Finding(
            "device",
            Status.PROBLEM,
            f"torch {facts.versions.get('torch')} can't use the card at {facts.unused_cards[0]}",
            "see that nvidia-smi works (driver; docker run --gpus all), then install a torch that "
            "is built for CUDA",
        )
    else:
        yield Finding(
            "device",
            Status.NOTE,
            f"no GPU here: the host device is used ({facts.identity.card})",
            "nothing to do where the KV cache is in CPU memory",
        )


def check_link(facts: Facts) -> Iterator[Finding]:
    if not facts.has_gpu:
        return
    link = facts.link
    if link is None:
        yield Finding("link", Status.NOTE, "the system does not show the link of the card")
        return
    if link.now.gen < link.best.gen or link.now.lanes < link.best.lanes:
        yield Finding(
            "link",
            Status.PROBLEM,
            f"{link.now}, where card and slot can do {link.best}: "
            f"{link.now.gb_per_s:.0f} of {link.best.gb_per_s:.0f} GB/s",
            "reseat the card, or move it to a slot with all lanes; look at the BIOS for lane "
            "splitting (bifurcation) and a link speed that is set by hand",
        )
    elif link.best != link.card:
        yield Finding(
            "link",
            Status.NOTE,
            f"{link.now}, all that the slot can do; the card can do {link.card}",
            "a slot of that kind would be faster",
        )
    else:
        yield Finding("link", Status.OK, f"{link.now}, all that card and slot can do")


def check_plain_copy(facts: Facts) -> Iterator[Finding]:
    limits = [speed for speed in facts.speeds if speed.path is None]
    if not limits:
        return
    best = {way: max(s.gb_per_s for s in limits if s.direction is way) for way in Direction}
    what = "one plain copy: " + ", ".join(f"{way.value} {best[way]:.1f} GB/s" for way in best)
    now = facts.link.now if facts.link is not None else None
    if now is not None and min(best.values()) < _LEAST_OF_LINK * now.gb_per_s:
        yield Finding(
            "plain copy",
            Status.PROBLEM,
            f"{what}, where {now} carries {now.gb_per_s:.0f}",
            "look for other traffic on the same PCIe switch, for memory on another NUMA node, and "
            "for an IOMMU that translates (iommu=pt)",
        )
    else:
        yield Finding("plain copy", Status.OK, what)


def check_paths(facts: Facts) -> Iterator[Finding]:
    if facts.failure:
        yield Finding(
            "paths",
            Status.PROBLEM,
            f"trial transfers failed: {facts.failure}",
            "free memory on the card and the host, then see whether torch alone can use the card",
        )
        return
    lost = [path for path in Path if path not in {speed.path for speed in facts.speeds}]
    if Path.STAGED in lost:
        yield Finding(
            "paths",
            Status.PROBLEM,
            "staged: the kernels do not run here",
            "reinstall triton, and see that a C compiler and the cache in ~/.triton can be used",
        )
    if Path.COPY_ENGINE in lost:
        yield Finding(
            "paths",
            Status.PROBLEM,
            "copy_engine: the driver takes no batches of copies, big pages are staged",
            "install a driver for CUDA 12.8 or later (570)",
        )
    if not lost or lost == [Path.ZERO_COPY]:  # which is for `check_pinning` to explain
        yield Finding("paths", Status.OK, ", ".join(p.value for p in Path if p not in lost))


def check_calibration(facts: Facts) -> Iterator[Finding]:
    if facts.calibration_warning:
        what, advice = facts.calibration_warning, "triton-offload calibrate makes a new one"
        yield Finding("calibration", Status.PROBLEM, what, advice)
    elif facts.calibration is not None:
        yield Finding("calibration", Status.OK, "paths follow what was measured on this machine")
    else:
        what = "paths follow published figures, not a measurement of this machine"
        yield Finding("calibration", Status.NOTE, what, "triton-offload calibrate measures it")


def check_limits(facts: Facts) -> Iterator[Finding]:
    for limit in facts.limits:
        yield Finding("limits", Status.NOTE, limit)


def check_pinning(facts: Facts) -> Iterator[Finding]:
    if not facts.has_gpu or facts.failure:
        return
    limit, pinned = facts.locked_limit, facts.pinned_bytes
    told = "no limit" if limit is None else format_bytes(limit)
    advice = (
        "ulimit -l unlimited; docker run --ulimit memlock=-1; LimitMEMLOCK=infinity in a "
        "systemd unit"
    )
    if pinned == 0:
        what = (
            f"host memory can't be pinned (ulimit -l: {told}): copies are slower, zero copy is off"
        )
        yield Finding("pinned memory", Status.PROBLEM, what, advice)
    elif limit is not None and pinned <= limit < facts.host_bytes:
        what = f"{format_bytes(facts.host_bytes)} are to be pinned, and ulimit -l is {told}"
        yield Finding("pinned memory", Status.NOTE, f"{what}, if the driver applies it", advice)
    elif limit is not None and limit < pinned:
        what = f"a trial pinned {format_bytes(pinned)}: the driver does not apply ulimit -l"
        yield Finding("pinned memory", Status.OK, f"{what} ({told})")
    else:
        what = f"a trial pinned {format_bytes(pinned)} (ulimit -l: {told})"
        yield Finding("pinned memory", Status.OK, what)


def check_memory(facts: Facts) -> Iterator[Finding]:
    sizes = {
        "the control group's limit is": facts.memory_limit,
        "available memory is": facts.memory_available,
    }
    known = {name: size for name, size in sizes.items() if size is not None}
    if not known:
        return
    name = min(known, key=lambda name: known[name])
    what = f"{name} {format_bytes(known[name])}"
    if known[name] < facts.host_bytes:
        yield Finding(
            "memory",
            Status.PROBLEM,
            f"{what}, too little for a pool of {format_bytes(facts.host_bytes)}",
            "give the container more (docker run --memory), or the pool less (host_bytes)",
        )
    else:
        yield Finding("memory", Status.OK, what)


def check_numa(facts: Facts) -> Iterator[Finding]:
    if facts.node is None or not facts.pool_nodes:
        return
    pages = sum(facts.pool_nodes.values())
    near = facts.pool_nodes.get(facts.node, 0) / pages
    nodes = ", ".join(str(node) for node in sorted(facts.pool_nodes))
    if near < 0.9:
        yield Finding(
            "NUMA",
            Status.PROBLEM,
            f"the card is on node {facts.node}, {1 - near:.0%} of a trial pool's pages are not "
            f"(nodes {nodes}): transfers cross sockets",
            f"numactl --cpunodebind={facts.node} --membind={facts.node} before the program; "
            f"docker run --cpuset-mems={facts.node}",
        )
    else:
        yield Finding("NUMA", Status.OK, f"card and pool are on node {facts.node}")


def check_huge_pages(facts: Facts) -> Iterator[Finding]:
    if not facts.has_gpu or not facts.huge_pages:
        return
    file = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    if facts.huge_pages in ("never", "deny"):
        what = f"the pool gets no huge pages ({facts.huge_pages}): pinning it takes longer"
        yield Finding("huge pages", Status.NOTE, what, f"echo within_size > {file} (as root)")
    else:
        yield Finding("huge pages", Status.OK, f"for shared memory: {facts.huge_pages}")


def check_shared_memory(facts: Facts) -> Iterator[Finding]:
    if not facts.has_gpu or facts.shm_bytes is None:
        return
    what = f"/dev/shm holds {format_bytes(facts.shm_bytes)}"
    if facts.shm_bytes < facts.host_bytes:
        yield Finding(
            "shared memory",
            Status.PROBLEM,
            f"{what}: behind vLLM a pool of {format_bytes(facts.host_bytes)} lies there",
            "docker run --shm-size or --ipc=host; mount -o remount,size=... /dev/shm",
        )
    else:
        yield Finding("shared memory", Status.OK, what)


def check_versions(facts: Facts) -> Iterator[Finding]:
    torch, triton, vllm = (facts.versions.get(name) for name in ("torch", "triton", "vllm"))
    yield _at_least("torch", torch, TORCH)
    if facts.has_gpu or triton is not None:
        yield _at_least("triton", triton, TRITON)
    if vllm is None:
        yield Finding("vllm", Status.OK, "not installed: the plug-in is not used")
    elif vllm.startswith(tuple(f"{version}." for version in VLLM)):
        yield Finding("vllm", Status.OK, vllm)
    else:
        what = f"{vllm}: the plug-in is for {' and '.join(VLLM)}"
        yield Finding("vllm", Status.PROBLEM, what, f"pip install 'vllm=={VLLM[-1]}.*'")


def _at_least(name: str, version: str | None, least: str) -> Finding:
    if version is not None and _numbers(version) >= _numbers(least):
        return Finding(name, Status.OK, version)
    what = f"{version or 'not installed'}: expected {least} or later"
    return Finding(name, Status.PROBLEM, what, f"pip install '{name}>={least}'")


def _numbers(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


_CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    check_device,
    check_link,
    check_plain_copy,
    check_paths,
    check_calibration,
    check_limits,
    check_pinning,
    check_memory,
    check_numa,
    check_huge_pages,
    check_shared_memory,
    check_versions,
)
