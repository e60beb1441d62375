"""Where a pool's pages are asked to lie, and how large to be: before anybody touches them."""

from __future__ import annotations

import ctypes
import mmap
import platform
from pathlib import Path

import pytest
import torch

import triton_offload.pool.preparation as preparation_module
from triton_offload.device import numa
from triton_offload.device.host import HostDevice
from triton_offload.pool.host_pool import HostPool
from triton_offload.pool.placement import place

GPU = "0000:17:00.0"
PAGES = 64


def mapping() -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, PAGES * mmap.PAGESIZE), dtype=torch.uint8)


def line_of(file: str, address: int, prefix: str = "") -> str:
    """What the system says of the mapping that begins there."""
    found = ""
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        begin = line.partition(" ")[0].partition("-")[0]
        if begin == f"{address:x}" or begin == f"{address:08x}":
            found = line
            if not prefix:
                return line
        elif found and prefix and line.startswith(prefix):
            return line
    return ""


def may_bind() -> bool:
    """Whether the system lets a process ask for what it has by default."""
    memory = mapping()
    number = numa._MBIND.get(platform.machine(), -1)
    address, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_ulong(mmap.PAGESIZE)
    nothing = ctypes.c_ulong(0)
    libc = ctypes.CDLL(None)
    return libc.syscall(ctypes.c_long(number), address, size, 0, None, nothing, 0) == 0


needs_mbind = pytest.mark.skipif(not may_bind(), reason="the system allows no mbind here")


@pytest.fixture
def several_nodes(monkeypatch):
    monkeypatch.setattr(numa, "has_several_nodes", lambda: True)


def made_up_system(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        place_of = {
            "numa_node": f"bus/pci/devices/{GPU}/numa_node",
            "has_memory": "devices/system/node/has_memory",
        }[name]
        (folder / place_of).parent.mkdir(parents=True, exist_ok=True)
        (folder / place_of).write_text(text + "\n")
    return folder


def test_a_card_is_on_the_node_that_the_system_says(tmp_path):
    assert numa.node_of_card(GPU, tmp_path) is None
    assert numa.node_of_card(GPU, made_up_system(tmp_path, numa_node="1")) == 1
    assert numa.node_of_card(GPU, made_up_system(tmp_path, numa_node="-1")) is None


@pytest.mark.parametrize(
    ("text", "several"), [("0", False), ("1", False), ("0-1", True), ("0,8", True)]
)
def test_memory_is_on_several_nodes_where_the_system_lists_them(text, several, tmp_path):
    assert numa.has_several_nodes(made_up_system(tmp_path, has_memory=text)) is several
    assert not numa.has_several_nodes(tmp_path / "nothing")


@needs_mbind
def test_all_pages_of_a_pool_are_asked_for_on_the_node_of_the_card(several_nodes):
    memory = mapping()
    assert place(memory, 0) == ()
    memory.fill_(1)
    line = line_of("numa_maps", memory.data_ptr())
    assert "prefer" in line
    assert f"dirty={PAGES}" in line  # one mapping still: all of it has the policy


@needs_mbind
def test_what_is_refused_is_said_and_the_memory_is_as_good(several_nodes):
    memory = mapping()
    (note,) = place(memory, 9)
    assert note == "the pool may not lie on the NUMA node 9 of the device (mbind: Invalid argument)"
    (note,) = place(memory, 70)  # of a second word of the mask
    assert "node 70" in note
    assert memory.fill_(1).sum() == memory.numel()


def test_a_machine_whose_call_is_not_known_is_said(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    memory = mapping()
    assert numa.prefer(memory.data_ptr(), 1, 0) == "no call for it is known on riscv64"


def test_nothing_is_asked_for_where_there_is_one_node_or_no_card(monkeypatch):
    monkeypatch.setattr(numa, "prefer", None)
    for several, node in ((True, None), (False, 0)):
        monkeypatch.setattr(numa, "has_several_nodes", lambda several=several: several)
        assert place(mapping(), node) == ()


def test_huge_pages_are_asked_for():
    memory = mapping()
    place(memory, None)
    assert " hg" in line_of("smaps", memory.data_ptr(), "VmFlags:")


def test_a_system_without_huge_pages_does_without(monkeypatch):
    def none(name):
        raise OSError("no libc")

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert place(mapping(), None) == ()


def test_a_pool_is_placed_before_its_pages_are_touched(several_nodes, monkeypatch):
    """And keeps what was refused."""
    steps = []
    monkeypatch.setattr(numa, "prefer", lambda *args: steps.append(args) or "refused")
    monkeypatch.setattr(preparation_module, "_populate", lambda piece: steps.append("touched"))
    device = HostDevice()
    device.numa_node = 3
    pool = HostPool.allocate(device, 5, mmap.PAGESIZE)
    pool.wait_ready(60)
    assert steps == [(pool.slots.data_ptr(), 5 * mmap.PAGESIZE, 3), "touched"]
    assert pool.notes == ("the pool may not lie on the NUMA node 3 of the device (refused)",)
    pool.close()


def test_a_pool_that_the_device_allocates_reads_as_zeros_and_is_pinned():
    memory = torch.full((64,), 0xA5, dtype=torch.uint8)
    device = HostDevice()
    device.empty_pinned = lambda num_bytes: memory[:num_bytes]
    with torch.inference_mode():
        pool = HostPool.allocate(device, 3, 16)
    assert pool.pinned
    assert not pool.slots.any()
    assert not pool.slots.is_inference()
    assert (pool.slots.shape, pool.piece_slots) == ((3, 16), 3)
    assert memory[48:].tolist() == [0xA5] * 16
    pool.close()
    assert not pool.pinned
