"""vLLM's canonical layout: chunks that are the same whatever the number of ranks.

In a slot lie whole pages, of all heads and tokens. Each rank has some of every page's bytes, in
fragments, and all ranks fill the slot together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from triton_offload.kernels.fragments import Fragment
from triton_offload.transfer.layout import CacheLayout
from triton_offload.vllm.spec import tensors_of


def canonical_layout(kv_caches: Any, blocks_per_chunk: int) -> CacheLayout:
    """This rank's fragments of the pages. `kv_caches`: vLLM's, of which each ref has a mapping.

    Ranks that hold the same bytes (of replicated heads, or of MLA) all write them. vLLM has them
    take turns; what is written is the same.
    """
    place_bytes = [0] * len(kv_caches.tensors)
    groups = []
    for refs in kv_caches.group_data_refs:
        fragments: dict[Fragment, None] = {}  # layers that share one cache name the same ones
        for ref in refs:
            whole = ref.mapping.canonical_page_size_bytes
            place_bytes[ref.tensor_idx] = max(place_bytes[ref.tensor_idx], whole)
            fragments.update(dict.fromkeys(_fragments(ref.tensor_idx, ref.mapping)))
        groups.append(list(fragments))
    return CacheLayout.in_fragments(tensors_of(kv_caches), blocks_per_chunk, place_bytes, groups)


def _fragments(tensor: int, mapping: Any) -> Iterator[Fragment]:
    for run in mapping.runs:
        for i in range(run.num_fragments):
            here = run.local_offset + i * run.local_stride
            there = run.canonical_offset + i * run.canonical_stride
            yield Fragment(tensor, here, run.fragment_size, there)
