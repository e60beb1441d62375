"""What one launch comes to, counted by the imitated card that executes the compiled PTX.

    python bench/run.py executed

Nothing here is a time of a card: what is counted decides how fast a link can be used, not how fast
it is. The same job for every kernel: 1 MiB of pages between device memory and slots, which lie in
pinned memory (zero copy) or beside the pages (staged). The peer's kernel is compiled beside ours
where vLLM is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from card.build import NO_COMPILER, compiler
from card.kernels import launch, load, move_pages
from card.machine import Counters, Kind, Memory
from kernel_code import TARGETS
from test_static import PEER_CHUNK_BYTES, compile_peer
from timing import note

from triton_offload.kernels.pages import choose_config
from triton_offload.kernels.table import PageTable

pytestmark = pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)

KIB = 1024
JOB_BYTES = 1024 * KIB
PAGE_KIB = (4, 16, 64)
TARGET = "sm_90"
PEER_PROGRAMS = 12  # what vLLM launches


class Job:
    """uint8 [n, page_bytes] each, full of noise; page ``blocks[i]`` goes with slot ``i``."""

    def __init__(self, page_bytes: int) -> None:
        self.count = JOB_BYTES // page_bytes
        self.page_bytes = page_bytes
        generator = torch.Generator().manual_seed(page_bytes)
        shape = (2, self.count, page_bytes)
        noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.pages, self.slots = noise[0].clone(), noise[1].clone()
        self.blocks = torch.randperm(self.count, generator=generator)

    def check(self) -> None:
        assert torch.equal(self.pages[self.blocks], self.slots)


def ours(job: Job, direction: str, *, zero_copy: bool) -> tuple[Counters, int]:
    """And how many CTAs it took."""
    config = choose_config(zero_copy=zero_copy)
    kind = Kind.PINNED if zero_copy else Kind.DEVICE
    blocks, table = job.blocks.tolist(), PageTable([job.pages])
    (counted,) = move_pages(
        TARGETS[TARGET], direction, table, blocks, job.slots, config=config, slots_in=kind
    )
    return counted, config.programs  # there are more tiles than programs


def vllms(job: Job, direction: str) -> tuple[Counters, int]:
    """An address each way and a size for every page, in device memory. vLLM launches it for loads
    of pages of less than 28 KiB; larger ones, and stores, take the copy engine."""
    handle = load(compile_peer(TARGET, min(job.page_bytes, PEER_CHUNK_BYTES)))
    pages = job.pages.data_ptr() + job.blocks * job.page_bytes
    slots = job.slots.data_ptr() + torch.arange(job.count) * job.page_bytes
    source, destination = (pages, slots) if direction == "gather" else (slots, pages)
    sizes = torch.full((job.count,), job.page_bytes)
    with Memory() as memory:
        memory.add(job.pages.data_ptr(), JOB_BYTES)
        memory.add(job.slots.data_ptr(), JOB_BYTES, Kind.PINNED)
        for each in (source, destination, sizes):
            memory.add(each.data_ptr(), 8 * job.count)
        addresses = (source.data_ptr(), destination.data_ptr(), sizes.data_ptr())
        return launch(handle, PEER_PROGRAMS, (*addresses, job.count)), PEER_PROGRAMS


KERNELS: dict[str, Callable[[Job, str], tuple[Counters, int]]] = {
    "ours, zero copy": lambda job, direction: ours(job, direction, zero_copy=True),
    "ours, staged": lambda job, direction: ours(job, direction, zero_copy=False),
    "vLLM's, zero copy": vllms,
}


@pytest.mark.parametrize("direction", ["gather", "scatter"])
@pytest.mark.parametrize("page_kib", PAGE_KIB)
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_launch(benchmark: Any, kernel: str, page_kib: int, direction: str) -> None:
    job = Job(page_kib * KIB)
    KERNELS[kernel](job, direction)  # compiles: the time below is that of executing
    counted, programs = benchmark.pedantic(KERNELS[kernel], (job, direction))
    job.check()
    note(
        benchmark,
        "executed",
        kernel=kernel,
        page_bytes=job.page_bytes,
        direction=direction,
        target=TARGET,
        programs=programs,
        accesses={str(width): n for width, n in counted.accesses_by_width.items() if n},
        lines_of_access=counted.lines / counted.accesses,
        in_flight_bytes=counted.most_bytes_in_flight,
        host_round_trips=counted.host_round_trips,
        # Of a lane, for each 16 bytes that are moved.
        instructions=counted.instructions * 32 / (JOB_BYTES / 16),
    )
    benchmark.extra_info["device"] = "an imitated card"
