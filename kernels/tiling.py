"""How pages are cut into the tiles that a program of a kernel moves at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import triton

from .arguments import as_integer
from .table import ROW_BYTES, PageTable

# The axis of a tile that the compiler deals warps to first, after the one of adjacent words: where
# axes are alike, triton 3.6 takes the first, later ones the last.
PAGE_AXIS = 0 if triton.__version__.startswith("3.6.") else 1


@dataclass(frozen=True)
class KernelConfig:
    """How a launch is cut up."""

    warps: int
    """Warps of a CTA (of 32 lanes on NVIDIA, 64 on AMD)."""
    tile_bytes: int
    """Bytes that a CTA has in flight where no mask over words is needed (half of it otherwise).
    A power of two. Words narrower than 8 bytes make it smaller in proportion, and so do pages
    of less than 128 bytes, whose ids take up the registers."""
    programs: int
    """CTAs of a launch: how many SMs it may keep busy."""
    stages: int = 1
    """Tiles that a CTA has in flight: one, in registers, or more, in a ring in shared memory, which
    holds them all. A ring is for NVIDIA; words narrower than 16 bytes have none, and what registers
    hold for a tile. A power of two."""

    def __post_init__(self) -> None:
        for name, least in (("warps", 1), ("tile_bytes", 1024), ("stages", 1)):
            value = as_integer(name, getattr(self, name), least)
            if value & (value - 1):
                raise ValueError(f"{name}: expected a power of two, got {value}")
        as_integer("programs", self.programs, 1)


def ring_config(programs: int) -> KernelConfig:
    """64 KiB in flight per CTA, in shared memory: of that, every card from sm_80 on has 99 KiB for
    a CTA (so sm_86, sm_89 and sm_120; sm_80 has 163, sm_90 and sm_100 227)."""
    return KernelConfig(warps=4, tile_bytes=8 * 1024, programs=programs, stages=8)


def choose_config(*, zero_copy: bool, backend: str = "cuda") -> KernelConfig:
    """The configuration for slots in mapped host memory (``zero_copy``) or in device memory.

    Args:
        backend: ``cuda`` or ``hip``.

    Zero copy wants bytes in flight: 1,024 threads with 128 bytes each are what the registers of an
    SM hold. Staged kernels leave room beside them on the SM for the model's.
    """
    if backend not in ("cuda", "hip"):
        raise ValueError(f"backend: expected cuda or hip, got {backend!r}")
    # Threads of a CTA are what counts; a wave of 64 lanes is two warps.
    lanes = 2 if backend == "hip" else 1
    if zero_copy:
        return KernelConfig(warps=32 // lanes, tile_bytes=128 * 1024, programs=2)
    return KernelConfig(warps=8 // lanes, tile_bytes=32 * 1024, programs=16)


def summing_config(config: KernelConfig) -> KernelConfig:
    """The configuration for kernels that add up as well, with as many bytes in flight. Not for a
    ring.

    1,024 threads with 128 bytes each have no register left to add up in. Half as many with twice
    the bytes have 20, and what each does once per tile it does for twice the bytes.
    """
    return replace(config, warps=config.warps // 2) if config.tile_bytes > 64 * 1024 else config


@dataclass(frozen=True)
class KernelSpec:
    """What a compiled kernel is fixed to: the shape of a tile, and how wide an access may be."""

    word_bytes: int
    """Every address and size is a multiple of it: 16, 8, 4, 2 or 1."""
    pages: int
    """Pages of a tile, a power of two."""
    words: int
    """Elements of ``element_bytes`` of each page of a tile, a power of two."""
    exact: bool
    """Every strip of a page has exactly ``words`` elements: no mask over them."""
    warps: int
    stages: int = 1
    """Tiles in flight: one in registers, or a ring of them in shared memory."""
    sums: bool = False
    """Pages are added up as they pass; a ring does not."""

    @property
    def element_bytes(self) -> int:
        """Bytes of a tile's element. Two 8-byte elements make a 16-byte access."""
        return min(self.word_bytes, 8)

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile; as many as one CTA has in flight, but for a ring."""
        return self.pages * self.words * self.element_bytes

    @property
    def span(self) -> int:
        """Elements of a page that its threads move in one access each: a warp's, or fewer where a
        thread then has fewer pages, and fewer addresses to keep; but never a part of a line."""
        of_warp = 32 * (self.word_bytes // self.element_bytes)
        of_page = self.warps * of_warp // self.pages
        # Two warps of a page share a span: triton 3.6 else keeps an offset for each access, for it
        # takes the highest bit of a thread's number as a choice between constants.
        span = of_page if of_page <= 2 * of_warp else of_warp
        return min(self.words, max(_line_elements(self.word_bytes), span))

    @property
    def fold(self) -> int:
        """Spans of a page that the CTA's threads move in one access each. Where they add up, a page
        has so many parts, each with a sum of its own: no thread needs another's."""
        threads_words = 32 * self.warps * (self.word_bytes // self.element_bytes)
        return min(self.words // self.span, max(1, threads_words // (self.span * self.pages)))

    def constants(self) -> dict[str, int | bool | None]:
        """Of the kernel that moves such tiles, in the order of its parameters."""
        if self.stages > 1:
            return {
                "PAGES": self.pages,
                "WORDS": self.words,
                "EXACT": self.exact,
                "WARPS": self.warps,
                "STAGES": self.stages,
            }
        plain = {} if self.sums else {"sums": None}  # no parameter of a kernel that adds nothing up
        return plain | {
            "WORD_BYTES": self.word_bytes,
            "PAGES": self.pages,
            "WORDS": self.words,
            "SPAN": self.span,
            "EXACT": self.exact,
            "PAGE_AXIS": PAGE_AXIS,
            "FOLD": self.fold if self.sums else 1,
        }


def kernel_specs(table: PageTable, slots_alignment: int, config: KernelConfig) -> list[KernelSpec]:
    """What a transfer of ``table`` launches: one kernel for each alignment class, widest first."""
    return [spec for spec, _, _ in cut_into_strips(table, slots_alignment, config)]


def cut_into_strips(
    table: PageTable, slots_alignment: int, config: KernelConfig
) -> list[tuple[KernelSpec, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Cut the pages of each alignment class into strips, int64 ``[num_strips, 5]``, and the number
    of the first row of each (see ``sums``), int64 ``[num_strips]``."""
    plan = []
    words = [min(row.alignment, slots_alignment) for row in table.pages]
    for word_bytes in sorted(set(words), reverse=True):
        rows = [row for row, word in zip(table.pages, words, strict=True) if word == word_bytes]
        item = min(word_bytes, 8)
        stages = config.stages if word_bytes == 16 else 1
        tile_bytes = config.tile_bytes if stages == config.stages else config.warps * 4096
        # As many elements a thread for narrow words as for wide ones: registers are the limit.
        tile = max(1, tile_bytes // 8)
        width, exact = _strip_width([row.page_bytes // item for row in rows], word_bytes, tile)
        pages = max(1, (tile if exact else tile // 2) // width)
        # Threads that have more bytes in flight have more registers.
        pages = min(pages, _most_pages(word_bytes, width, max(config.warps, tile_bytes // 4096)))
        cuts = [(row, start) for row in rows for start in range(0, row.page_bytes, width * item)]
        strips = [
            (
                row.view.data_ptr() + start,
                row.block_stride,
                min(width, (row.page_bytes - start) // item),
                row.offset + start,
                row.pitch,
            )
            for row, start in cuts
        ]
        numbers = [row.first_row + start // ROW_BYTES for row, start in cuts]
        spec = KernelSpec(word_bytes, pages, width, exact, config.warps, stages)
        plan.append((spec, np.array(strips, np.int64), np.array(numbers, np.int64)))
    return plan


def _most_pages(word_bytes: int, width: int, warps: int) -> int:
    """Pages of a tile for which the ids that its threads keep still fit their registers: measured
    as the most without a spill at 64 registers (128 where so many `warps` share half the threads),
    for triton 3.6 and 3.9, sm_80 to sm_100."""
    item = min(word_bytes, 8)
    line = min(width, _line_elements(word_bytes))
    pages_of_warp = 32 * (word_bytes // item) // line
    pages_of_thread = 4 if width <= (line if item == 8 else 2 * line) else 2
    return warps * pages_of_warp * pages_of_thread


def _line_elements(word_bytes: int) -> int:
    """Elements that make a whole line of 128 bytes, or where words are narrow, a warp's access."""
    return min(32, 128 // min(word_bytes, 8))


def _strip_width(page_elements: list[int], word_bytes: int, tile: int) -> tuple[int, bool]:
    """Elements of a strip for pages of so many elements, and whether every strip is full, so that
    no mask over words is needed."""
    item = min(word_bytes, 8)
    common = 1 << 62
    for elements in page_elements:
        common = min(common, elements & -elements)
    if common * item >= 512 or all(elements == common for elements in page_elements):
        return min(common, tile), True
    # Wide strips make few, long accesses; their last one may be mostly empty. From wide to narrow,
    # never under 128 bytes (a line): the first that wastes at most an eighth, else the tightest.
    width = min(tile // 2, 1 << (max(page_elements) - 1).bit_length())
    best, least = width, 0
    while True:
        padded = sum(-(-elements // width) * width for elements in page_elements)
        if least == 0 or padded < least:
            best, least = width, padded
        if padded * 8 <= sum(page_elements) * 9 or width * item <= 128:
            return best, False
        width //= 2
