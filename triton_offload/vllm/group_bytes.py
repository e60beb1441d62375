"""Which bytes of a block each KV cache group has, where groups lie over one another.

vLLM's groups share blocks: each block is one group's at a time, and has room for the largest. By
its own connector every group moves whole packed blocks. Here each has ranges of its own:

    block     | layer 0 | layer 1 | layer 2 | layer 3 |     the group with the most bytes
    group 1   | a     . | b     . |                         pages of two layers, a little padded
    ranges    | 0                 |                         one range: a gap so small goes with it

The scheduler and every rank work them out from vLLM's KVCacheConfig, alike. A rank holds them
against its tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import (
    get_offloading_group_ids,
)
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    MambaSpec,
    UniformTypeKVCacheSpecs,
    group_kernel_blocks,
)
from vllm.v1.kv_offload import base as vllm_base

# Padding of up to 1/16 of a page is moved with it where that makes one range of two: it costs less
# than another page to look up, and pages of DeepSeek V4 have 64 bytes in 37,440.
_GAP_PART = 16


@dataclass(frozen=True, slots=True)
class BlockRange:
    """`num_bytes` bytes of every block: block b's begin at byte `start + b * stride` of the memory
    that all caches share."""

    start: int
    stride: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.start + self.num_bytes

    def contains(self, other: BlockRange) -> bool:
        return self.stride == other.stride and self.start <= other.start and other.end <= self.end


GroupRanges = tuple[BlockRange, ...]


def ranges_of_groups(kv_cache_config: Any, layout: str | None) -> list[GroupRanges] | None:
    """The ranges of each group that vLLM offloads, from its KVCacheConfig; `layout`: the name of
    its KVCacheLayout.

    None where whole blocks are right (each group fills them), and where a layer's page is not one
    piece of its block: heads lie outside of layers or blocks, or what it is vLLM alone knows.
    """
    tensors = kv_cache_config.kv_cache_tensors
    if layout is None or set(layout[:2]) != {"L", "B"} or not tensors:
        return None
    if kv_cache_config.hisparse_host_num_blocks is not None:
        return None
    pages = _pages(tensors, packed=layout.startswith("B"))
    found: list[GroupRanges] = []
    for index in get_offloading_group_ids(kv_cache_config):
        group = kv_cache_config.kv_cache_groups[index]
        # A layer without a page reads another's.
        placed = [pages[name] for name in group.layer_names if name in pages]
        spec = _one_spec(group.kv_cache_spec)
        if not placed or group.host_resident or not isinstance(spec, AttentionSpec | MambaSpec):
            return None
        # The scheduler's copy has the spec of one layer for groups of several page sizes.
        own = _unpadded(spec)
        if {page.num_bytes for page in placed} == {spec.page_size_bytes}:
            placed = [replace(page, num_bytes=own) for page in placed]
        found.append(_merged(placed))
    block_bytes = tensors[0].size // kv_cache_config.num_blocks
    if all(bytes_of(ranges) == block_bytes for ranges in found):
        return None
    return found


def bytes_of(ranges: GroupRanges) -> int:
    """Bytes of a block."""
    return sum(part.num_bytes for part in ranges)


def own_caches(
    layers: Mapping[str, torch.Tensor], kv_cache_config: Any, groups: Sequence[GroupRanges]
) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """vLLM's CanonicalKVCaches of these ranges, and of each layer the tensors with its page.

    `layers`: vLLM's tensors, by name, which share one memory. Raises ValueError that names
    `kv_caches` where a layer's bytes are not all in a range of its group.
    """
    num_blocks = kv_cache_config.num_blocks
    numbers = {part: i for i, part in enumerate(dict.fromkeys(itertools.chain(*groups)))}
    tensors_of: dict[str, tuple[int, ...]] = {}
    memory: Any = None
    for index, ranges in zip(get_offloading_group_ids(kv_cache_config), groups, strict=True):
        for name in kv_cache_config.kv_cache_groups[index].layer_names:
            cache, storage = layers[name], layers[name].untyped_storage()
            memory = storage if memory is None else memory
            seen = _seen(group_kernel_blocks(cache, num_blocks))
            holders = [part for part in ranges if part.contains(seen)]
            if not holders or storage.data_ptr() != memory.data_ptr():
                raise ValueError(
                    f"kv_caches[{name!r}]: expected its bytes in one of {list(ranges)} of the "
                    f'memory that all share, got {seen}; "group_slots": false has vLLM\'s blocks'
                )
            tensors_of[name] = (numbers[holders[0]],)
    device = next(iter(layers.values())).device
    tensors = [
        vllm_base.CanonicalKVCacheTensor(_view(memory, device, num_blocks, part), part.num_bytes)
        for part in numbers
    ]
    refs = [
        [vllm_base.CanonicalKVCacheRef(numbers[part], part.num_bytes) for part in ranges]
        for ranges in groups
    ]
    return vllm_base.CanonicalKVCaches(tensors, refs), tensors_of


def _pages(tensors: Iterable[Any], packed: bool) -> dict[str, BlockRange]:
    """Where vLLM places each layer's page, with its padding."""
    return {
        name: BlockRange(
            tensor.offset + i * tensor.layer_stride,
            tensor.block_stride,
            tensor.layer_stride if packed else tensor.block_stride,
        )
        for tensor in tensors
        for i, name in enumerate(tensor.layers)
    }


def _one_spec(spec: Any) -> Any:
    """As the scheduler's copy of the configuration has it."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return next(iter(spec.kv_cache_specs.values()))
    return spec


def _unpadded(spec: Any) -> int:
    """Bytes of a page that a layer uses."""
    if isinstance(spec, MambaSpec):
        return int(replace(spec, page_size_padded=None).page_size_bytes)
    return int(spec.unpadded_page_size_bytes)


def _merged(pages: Iterable[BlockRange]) -> GroupRanges:
    """As few ranges as hold the pages, and no more between them than little padding."""
    merged: list[BlockRange] = []
    for page in sorted(pages, key=lambda page: (page.stride, page.start)):
        if merged:
            last = merged[-1]
            gap, whole = page.start - last.end, max(page.end, last.end) - last.start
            if page.stride == last.stride >= whole and gap * _GAP_PART <= page.num_bytes:
                merged[-1] = replace(last, num_bytes=whole)
                continue
        merged.append(page)
    return tuple(sorted(merged, key=lambda part: part.start))


def _seen(cache: torch.Tensor) -> BlockRange:
    """What a tensor [num_blocks, ...] has of each block."""
    dimensions = zip(cache.shape[1:], cache.stride()[1:], strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in dimensions)
    element = cache.element_size()
    start, stride = int(cache.storage_offset()), cache.stride(0)
    return BlockRange(start * element, stride * element, elements * element)


def _view(memory: Any, device: torch.device, num_blocks: int, part: BlockRange) -> torch.Tensor:
    """int8 [num_blocks, bytes]."""
    view = torch.empty(0, dtype=torch.int8, device=device)
    return view.set_(memory, part.start, (num_blocks, part.num_bytes), (part.stride, 1))
