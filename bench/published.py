"""Figures that others published, beside what the model says of the same.

Two constants are fitted, both of the driver: `Driver.small_rate` on the four figures below 28 KiB
in the last column of vLLM's table, `Driver.depth` on its 64 KiB x 10,000. Figures that one other
constant was read from are *taken*. Neither shows anything. All others are checks.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from cards import B200, GB300, GH200, H100_SXM, PCIE_5
from model import Kernel, batch_seconds, cta_rate, link_rate, plain_copy_seconds, zero_copy_seconds
from units import GB, GIB, KIB

from triton_offload.specs import Direction

WITHIN = 0.2

VLLM_TABLE = "vLLM pull request 42212: one batch of copies to the device, H100, PCIe Gen5"
VLLM_MERGING = "vLLM pull request 48434: batches of copies to the device, H100, PCIe Gen5"
SGLANG = "SGLang pull request 40278: kernels on mapped host memory, GB300"
TENSORRT = "TensorRT-LLM's comments in batchedPageCopy.cu"
NVBANDWIDTH = "nvbandwidth issue 24: copies by all SMs, H100"

COUNTS = (10_000, 50_000, 100_000)
#: GB/s by page size, in the order of COUNTS
TABLE = {
    4 * KIB: (6.8, 4.0, 3.8),
    8 * KIB: (6.8, 5.2, 5.3),
    16 * KIB: (7.1, 6.3, 6.3),
    24 * KIB: (25.8, 6.7, 6.9),
    28 * KIB: (27.5, 39.9, 44.1),
    64 * KIB: (38.8, 51.4, 51.8),
}


class Role(Enum):
    CHECK = "check"
    FITTED = "fitted"
    TAKEN = "taken"


@dataclass(frozen=True, slots=True)
class Figure:
    """`published` and `predicted` in GB/s. `why`: what is thought of it where it isn't reached."""

    source: str
    what: str
    published: float
    predicted: float
    role: Role = Role.CHECK
    why: str = ""

    @property
    def error(self) -> float:
        """Of the published figure, how much the model says too much."""
        return self.predicted / self.published - 1

    @property
    def reached(self) -> bool:
        return abs(self.error) <= WITHIN


def figures() -> list[Figure]:
    return [*_table(), *_merging(), *_sglang(), *_tensorrt(), *_all_sms()]


def fitted_small_rate() -> float:
    """The geometric mean of what the last column below 28 KiB leaves a descriptor's bytes."""
    driver = H100_SXM.driver
    rates = [
        size / (size / (speeds[-1] * GB) - driver.enqueue_seconds)
        for size, speeds in TABLE.items()
        if size < driver.small_bytes
    ]
    return statistics.geometric_mean(rates)


def fitted_depth() -> float:
    """Descriptors that were queued before the engine began, of 10,000 of 64 KiB: what the link
    does not explain, over the cost of one."""
    pages, size = COUNTS[0], 64 * KIB
    took = pages * size / (TABLE[size][0] * GB)
    moved = plain_copy_seconds(H100_SXM, Direction.LOAD, pages * size)
    return (took - moved) / H100_SXM.driver.enqueue_seconds


def _table() -> Iterator[Figure]:
    for size, speeds in TABLE.items():
        for count, speed in zip(COUNTS, speeds, strict=True):
            seconds = batch_seconds(H100_SXM, Direction.LOAD, size, count)
            small = size < H100_SXM.driver.small_bytes
            fitted = (small and count == COUNTS[-1]) or (size == 64 * KIB and count == COUNTS[0])
            why = ""
            if small and count == COUNTS[0] and speed > 20:
                why = (
                    "here the driver already took the copy engine, which the model has from 28 KiB "
                    "on, whatever the count: its rule is not public"
                )
            what = f"{size // KIB} KiB x {count:,}"
            role = Role.FITTED if fitted else Role.CHECK
            yield Figure(VLLM_TABLE, what, speed, size * count / seconds / GB, role, why)


def _merging() -> Iterator[Figure]:
    """8,192 descriptors of 8 KiB, each call alone, and one call behind the other."""
    size, count = 8 * KIB, 8192
    seconds = batch_seconds(H100_SXM, Direction.LOAD, size, count)
    predicted = size * count / seconds / GB
    yield Figure(
        VLLM_MERGING, "8 KiB x 8,192, a call alone", size * count / 10.3e-3 / GB, predicted
    )
    yield Figure(
        VLLM_MERGING,
        "8 KiB x 8,192, call behind call",
        15.2,
        predicted,
        why="calls overlap there; the model knows one call, and takes what limits it for a rate",
    )
    merged = size * count / batch_seconds(H100_SXM, Direction.LOAD, 16 * size, count // 16) / GB
    alone = size * count / 1.49e-3 / GB
    yield Figure(VLLM_MERGING, "runs of 16 merged, 128 KiB x 512, a call alone", alone, merged)
    yield Figure(VLLM_MERGING, "runs of 16 merged, call behind call", 54.1, merged)
    yield Figure(
        VLLM_MERGING,
        "8 KiB x 12,288, execution alone",
        12_288 * size / 1.94e-3 / GB,
        12_288 * size / batch_seconds(H100_SXM, Direction.LOAD, size, 12_288) / GB,
        why="it contradicts the 5.3 of the table above, where the same author says that his older "
        "benchmark had run on the legacy stream: copies one by one, not a batch. If so, real "
        "batches of small loads are faster than the model has them",
    )


def _sglang() -> Iterator[Figure]:
    for direction, registers, tma in ((Direction.LOAD, 97, 192), (Direction.STORE, 93, 183)):
        way = "in" if direction is Direction.LOAD else "out"
        yield Figure(
            SGLANG,
            f"a CTA with 64 KiB in flight, {way}",
            48 if direction is Direction.LOAD else registers / 2,
            cta_rate(GB300, direction, 64 * KIB) / GB,
            Role.TAKEN if direction is Direction.LOAD else Role.CHECK,
        )
        for name, ctas, speed in (("registers, 2 CTAs", 2, registers), ("TMA, 4 CTAs", 4, tma)):
            seconds = zero_copy_seconds(GB300, direction, GIB, Kernel(ctas, 64 * KIB, 1024, 64))
            yield Figure(SGLANG, f"{name}, {way}", speed, GIB / seconds / GB)


def _tensorrt() -> Iterator[Figure]:
    def ring(ctas: int, direction: Direction) -> Kernel:
        return Kernel(ctas, (64 if direction is Direction.LOAD else 32) * KIB, 128, 40)

    for direction, ctas, share in ((Direction.LOAD, 12, 0.94), (Direction.STORE, 8, 0.97)):
        way = "in" if direction is Direction.LOAD else "out"
        yield Figure(
            TENSORRT,
            f"GH200: a CTA, {way}",
            43.0,
            cta_rate(GH200, direction, ring(1, direction).flight_bytes) / GB,
            Role.TAKEN if direction is Direction.STORE else Role.CHECK,
        )
        seconds = zero_copy_seconds(GH200, direction, GIB, ring(ctas, direction))
        published = share * link_rate(GH200, direction) / GB
        yield Figure(TENSORRT, f"GH200: {ctas} CTAs, {way}", published, GIB / seconds / GB)
    gen_4 = replace(PCIE_5, name="PCIe Gen4 x16", to_device=23.88 * GIB, to_host=17.45 * GIB)
    old_host = replace(H100_SXM, link=gen_4)
    for card, direction, speed, role, why in (
        (B200, Direction.LOAD, 39.99, Role.TAKEN, ""),
        (B200, Direction.STORE, 25.13, Role.TAKEN, ""),
        (old_host, Direction.LOAD, 23.89, Role.CHECK, ""),
        (
            old_host,
            Direction.STORE,
            8.56,
            Role.CHECK,
            "stores of a Hopper's SMs are capped in hardware, TensorRT-LLM's comments say; the "
            "next source has 52.8 by all SMs on Gen5. The model has no such cap: on Hopper, "
            "zero-copy stores by few CTAs may be a third of what is predicted",
        ),
    ):
        way = "in" if direction is Direction.LOAD else "out"
        name = f"{card.name}, {card.link.name}: 2 CTAs, {way}"
        seconds = zero_copy_seconds(card, direction, GIB, ring(2, direction))
        yield Figure(TENSORRT, name, speed * GIB / GB, GIB / seconds / GB, role, why)


def _all_sms() -> Iterator[Figure]:
    for direction, speed, why in (
        (
            Direction.LOAD,
            35.2,
            "no reason is published; the same by SMs reaches the copy engine's speed on a B200 and "
            "a GH200. On Hopper, zero-copy loads may end at two thirds of the link",
        ),
        (Direction.STORE, 52.8, ""),
    ):
        way = "in" if direction is Direction.LOAD else "out"
        kernel = Kernel(H100_SXM.sms, 64 * KIB, 512, 32)
        seconds = zero_copy_seconds(H100_SXM, direction, GIB, kernel)
        yield Figure(NVBANDWIDTH, f"132 CTAs, {way}", speed, GIB / seconds / GB, why=why)
