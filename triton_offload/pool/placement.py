"""Where a pool's pages come to lie, and how large they are: asked for before they are touched."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

import torch

from triton_offload.device import numa


def place(slots: torch.Tensor, node: int | None) -> tuple[str, ...]:
    """Ask for pages of the NUMA node, where there are several, and for huge ones, of which memory
    has fewer to pin. `slots`: a mapping of its own, from the first page to the last. What is
    refused, in words; the memory is as good without."""
    _ask_for_huge_pages(slots)
    if node is None or not numa.has_several_nodes():
        return ()
    refused = numa.prefer(slots.data_ptr(), slots.numel(), node)
    if refused is None:
        return ()
    return (f"the pool may not lie on the NUMA node {node} of the device ({refused})",)


def _ask_for_huge_pages(slots: torch.Tensor) -> None:
    with suppress(AttributeError, OSError):  # a system without libc, or without huge pages
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(slots.data_ptr()), ctypes.c_size_t(slots.numel()), mmap.MADV_HUGEPAGE
        )
